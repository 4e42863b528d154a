"""Pengi: published counts, a prefix of what was heard and asked, and the released file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.architectures.pengi import Pengi
from models.batch import Layout, Pair, collate
from models.checkpoints import import_into
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Message, Rendered

TOKENIZER: Any = load_tokenizer("bytes")
REQUESTS = ("generate audio caption", "this is a sound of", "what is it?")
ANSWERS = ("a dog barks", "rain", "two bells")
PREFIX, WORDS = 3, 24  # of the tiny preset


def tiny() -> Pengi:
    return Pengi.build(Pengi.preset("tiny"), TOKENIZER, seed=3)


def asked(request: str, answer: str | None = None) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": request}]}]
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def pairs_of(model: Pengi) -> list[Pair]:
    generator = torch.Generator().manual_seed(4)
    waves = [0.2 * torch.randn(4000 + 3000 * i, generator=generator) for i in range(len(REQUESTS))]
    clips = model.listen(waves)
    return [
        (model.render(TOKENIZER, asked(*texts), [clip]), [clip])
        for texts, clip in zip(zip(REQUESTS, ANSWERS, strict=True), clips, strict=True)
    ]


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


# ---- what was published ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> Pengi:
    return Pengi.on_meta(Pengi.preset("paper"))


def test_published_sizes(paper: Pengi) -> None:
    """GPT-2's 124 M are frozen. A mapper's layer: four matrices of 768², an MLP of twice the width, two norms."""
    layer = 4 * 768**2 + 768 + 2 * 768 * 1536 + 1536 + 768 + 4 * 768
    audio = 1024 * 40 * 768 + 40 * 768 + 40 * 768 + 4 * layer
    text = 40 * 768 + 4 * layer
    assert count(paper.llm.parameters()) == 124_439_808
    assert count(paper.mapper("audio_project").parameters()) == audio == 50_417_664
    assert count(paper.mapper("text_project").parameters()) == text == 18_929_664
    assert count(paper.encoders.parameters()) == 29_371_544
    trained = set(paper.trained_by(Pengi.preset("paper").recipe.stages[0].train))
    assert not any(name.startswith("llm") for name in trained)
    assert count(p for name, p in paper.named_parameters() if name in trained) == 98_718_872
    assert count(paper.parameters()) == 223_158_680


def test_the_larger_variant_has_about_320_million(paper: Pengi) -> None:
    """Arithmetic, not built here: CLIP's text tower, two projections and the text mapper's Linear make up for 97 M."""
    clip, out, projection = 63_165_952, 512 * 512, 512 * 1024 + 1024**2 + 2 * 1024
    linear = 1024 * 40 * 768 + 40 * 768
    assert count(paper.parameters()) + clip + out + projection + linear == pytest.approx(322e6, rel=0.01)


def test_a_clip_of_any_length_is_a_prefix_of_80_before_the_answer(paper: Pengi) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Pengi.preset("paper").without_weights().encoders["audio"])
    frames = [encoder.output_length(16_000 * seconds) for seconds in (1, 7, 60)]
    assert frames == [1, 1, 1]
    assert paper.audio_tokens({"audio": 1}) == 40
    model = tiny()
    model.connector, model.words = paper.connector, paper.words
    rendered = model.render(TOKENIZER, asked("what is it?", "a dog"), pairs_of(tiny())[0][1])
    assert next(at for at, label in enumerate(rendered.labels) if label != IGNORED) == 80


# ---- sequences ------------------------------------------------------------------------------------------------------


def test_the_request_ends_and_is_padded_and_the_answer_ends_too() -> None:
    model = tiny()
    rendered = pairs_of(model)[1][0]
    end = TOKENIZER.eos_token
    assert rendered.audio_at == [0, 1, 2]
    request = TOKENIZER.decode(rendered.ids[PREFIX : PREFIX + WORDS])
    assert request == "this is a sound of " + end + "!" * (WORDS - 20)
    assert TOKENIZER.decode(rendered.ids[PREFIX + WORDS :]) == "rain " + end
    learnt = [label for label in rendered.labels if label != IGNORED]
    assert learnt == rendered.ids[PREFIX + WORDS :]


def test_a_long_request_is_cut() -> None:
    ids = tiny().request(TOKENIZER, "x" * 100)
    assert TOKENIZER.decode(ids) == "x" * WORDS


# ---- the prefix -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_the_prefix_is_made_of_each_samples_own_vector_and_words(layout: Layout) -> None:
    """Word by word: padding words are attended to, as in the official code."""
    model = tiny()
    pairs = pairs_of(model)
    batch = collate(pairs, TOKENIZER.pad_token_id, layout)
    embedded, _ = model.embed(batch)
    table = model.llm.get_input_embeddings()
    for number, (rendered, (clip,)) in enumerate(pairs):
        mine = embedded[batch.segments == number + 1]
        vector = clip.features["audio"][None]
        heard, _ = model.mapper("audio_project")(vector, torch.tensor([1]))
        text = model.mapper("text_project")
        words = table(torch.tensor([rendered.ids[PREFIX : PREFIX + WORDS]]))
        constants = text.prefix_const[None]
        made = text.transformer(torch.cat([words, constants], dim=1))[:, WORDS:]
        assert torch.allclose(mine[:PREFIX], heard[0], atol=1e-5)
        assert torch.allclose(mine[PREFIX : PREFIX + WORDS], made[0], atol=1e-5)
        assert torch.equal(mine[PREFIX + WORDS :], table(torch.tensor(rendered.ids[PREFIX + WORDS :])))


@torch.no_grad()
def test_the_vector_is_normalised_before_it_is_mapped() -> None:
    model = tiny()
    vector, one = torch.randn(1, 1, 24), torch.tensor([1])
    louder = model.connect({"audio": 3 * vector}, {"audio": one})[0]
    assert torch.allclose(model.connect({"audio": vector}, {"audio": one})[0], louder, atol=1e-5)


@torch.no_grad()
def test_another_request_leaves_the_audio_half_as_it_was() -> None:
    model = tiny()
    clip = pairs_of(model)[0][1]
    rows = [(model.render(TOKENIZER, asked(request, "a"), clip), clip) for request in REQUESTS[:2]]
    first, second = model.embed(collate(rows, TOKENIZER.pad_token_id))[0][:, : PREFIX + WORDS]
    assert torch.equal(first[:PREFIX], second[:PREFIX])
    assert (first[PREFIX:] - second[PREFIX:]).abs().max() > 1e-3


def test_text_without_audio_has_no_prefix() -> None:
    model = tiny()
    batch = collate([(Rendered().text(TOKENIZER, "hello", learn=True), [])], TOKENIZER.pad_token_id)
    assert torch.equal(model.embed(batch)[0], model.llm.get_input_embeddings()(batch.ids))


# ---- the released file ----------------------------------------------------------------------------------------------


def official(model: Pengi) -> dict[str, Tensor]:
    """A file of the released layout: fact sheet a.md, section 8 (7). HTSAT's names are those of test_clap."""
    generator = torch.Generator().manual_seed(9)
    htsat = {
        "attention.output.dense.": "attn.proj.",
        "attention.self.relative": "attn.relative",
        "intermediate.dense.": "mlp.fc1.",
        "output.dense.": "mlp.fc2.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "batch_norm.": "bn0.",
    }
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        new = torch.randn(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        if name.startswith("encoders.audio.layers."):
            theirs = name.removeprefix("encoders.audio.layers.")
            for ours, part in htsat.items():
                theirs = theirs.replace(ours, part)
            found[f"audio_encoder.base.htsat.{theirs}"] = new
        elif name.startswith("encoders.audio."):
            found[name.replace("encoders.audio.", "audio_encoder.")] = new
        else:
            found[name.replace("connector.", "caption_decoder.").replace("llm.", "caption_decoder.gpt.")] = new
    for name in [name for name in found if ".self.query." in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    found["caption_decoder.gpt.lm_head.weight"] = found["caption_decoder.gpt.transformer.wte.weight"]
    return found


IGNORED_NAMES = {
    "audio_encoder.base.htsat.spectrogram_extractor.stft.conv_real.weight": torch.ones(2),
    "audio_encoder.base.htsat.logmel_extractor.melW": torch.ones(2),
    "audio_encoder.base.htsat.tscam_conv.weight": torch.ones(2),
    "audio_encoder.base.htsat.layers.0.blocks.1.attn_mask": torch.ones(2),
    "caption_decoder.gpt.transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
    "caption_decoder.gpt.transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
}


def test_every_tensor_of_the_released_file_arrives(tmp_path: Path) -> None:
    model = tiny()
    state = official(model)
    torch.save(
        {"model": {f"module.{name}": value for name, value in (state | IGNORED_NAMES).items()}}, tmp_path / "a.pth"
    )
    report = import_into(model, Pengi.checkpoint, tmp_path / "a.pth")
    assert len(report.ignored) == len(IGNORED_NAMES)
    assert set(report.loaded) == set(model.state_dict())
    ours = model.state_dict()
    attention = "layers.0.blocks.0.attn.qkv.weight"
    key = ours["encoders.audio.layers.layers.0.blocks.0.attention.self.key.weight"]
    assert torch.equal(key, state[f"audio_encoder.base.htsat.{attention}"].chunk(3)[1])
    for theirs, name in (
        ("caption_decoder.audio_project.linear.weight", "connector.audio_project.linear.weight"),
        ("caption_decoder.text_project.prefix_const", "connector.text_project.prefix_const"),
        ("caption_decoder.gpt.transformer.h.1.attn.c_attn.weight", "llm.transformer.h.1.attn.c_attn.weight"),
        ("audio_encoder.projection.linear2.weight", "encoders.audio.projection.linear2.weight"),
        ("audio_encoder.base.htsat.bn0.running_mean", "encoders.audio.layers.batch_norm.running_mean"),
    ):
        assert torch.equal(ours[name], state[theirs]), name


def test_the_other_released_file_is_refused(tmp_path: Path) -> None:
    """base.pth has a text tower, and a Linear in the text mapper, that this variant does not have."""
    model = tiny()
    more = {"caption_encoder.projection.linear1.weight": torch.ones(2, 2)}
    torch.save({"model": official(model) | more}, tmp_path / "base.pth")
    with pytest.raises(ValueError, match=r"1 unexpected: caption_encoder\.projection\.linear1\.weight"):
        import_into(model, Pengi.checkpoint, tmp_path / "base.pth")
