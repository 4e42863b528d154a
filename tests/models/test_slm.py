"""SLM: the adapter against the published 156 M, and an encoder-decoder backbone that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.architectures.slm import Slm
from models.batch import Batch, Layout, Pair, collate
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.recipe import Decoding
from models.rendering import IGNORED, Audio, Rendered

TOKENIZER = load_tokenizer("bytes")
EOS = int(TOKENIZER.eos_token_id)
WIDTH = 16
SAMPLES = (("Write it.", "stop", 11), ("Say", "turn it on", 4), ("Into German.", "halt", 17))  # request, answer, frames


@pytest.fixture
def model() -> Slm:
    return Slm.build(Slm.preset("tiny"), TOKENIZER, encoders=False, seed=2)


def clip(frames: int, seed: int = 0) -> Audio:
    return Audio({"speech": torch.randn(frames, WIDTH, generator=torch.Generator().manual_seed(seed))})


def messages(request: str, answer: str | None) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": request}]},
    ]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def pairs(model: Slm, answers: bool = True) -> list[Pair]:
    found: list[Pair] = []
    for number, (request, answer, frames) in enumerate(SAMPLES):
        audio = clip(frames, number)
        found.append((model.render(TOKENIZER, messages(request, answer if answers else None), [audio]), [audio]))
    return found


def batch_of(samples: list[Pair], layout: Layout = "right") -> Batch:
    return collate(samples, int(TOKENIZER.pad_token_id), layout)


# ---- published sizes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> Slm:
    return Slm.on_meta(Slm.preset("paper"))


def size(model: Slm, *groups: str) -> int:
    named = set(model.trained_by(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def test_the_adapter_is_within_half_a_percent_of_156_million(paper: Slm) -> None:
    layer = 4 * 1024 * 1024 + 3 * 1024 + 2 * 1024 * 4096 + 5 * 1024 + 4 * 1024
    assert size(paper, "connector") == 12 * layer + 2 * 1024 + 1025 * 4096 == 155_342_848
    assert size(paper, "connector") / 156e6 == pytest.approx(1, abs=0.005)


def test_the_foundation_models_have_their_sizes_and_the_adapter_is_one_percent(paper: Slm) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Slm.preset("paper").without_weights().encoders["speech"])
    speech = sum(p.numel() for p in encoder.parameters())
    assert speech == 580_492_096
    assert size(paper, "llm") == 12_921_057_280  # mT5-XXL: two tables of 250,112 rows
    assert size(paper, "connector") / (speech + size(paper, "llm")) == pytest.approx(0.0115, abs=0.0001)
    assert paper.audio_tokens({"speech": encoder.output_length(160_000)}) == 125  # 12.5 a second


def test_the_adapter_learns_alone_in_every_stage_of_every_preset() -> None:
    for name in ("paper", "small", "tiny"):
        preset = Slm.preset(name)  # type: ignore[arg-type]
        assert preset.lora is None
        assert all(stage.train == ("connector",) for stage in preset.recipe.stages)


# ---- sequence --------------------------------------------------------------------------------------------------


def test_audio_and_instruction_are_the_source_and_the_answer_is_the_target(model: Slm) -> None:
    rendered, _ = pairs(model)[0]
    assert rendered.audio_at == [0, 1, 2]  # 11 frames: the 1st, 5th and 9th
    source = 3 + len("Write it.") + 1
    assert TOKENIZER.decode(rendered.ids[3:source]) == f"Write it.{TOKENIZER.eos_token}"
    assert TOKENIZER.decode(rendered.ids[source:]) == f"stop{TOKENIZER.eos_token}"
    assert rendered.labels == [IGNORED] * source + rendered.ids[source:]


def test_the_chat_model_of_small_gets_the_marks_of_its_chat() -> None:
    """The byte tokenizer has SmolLM2's marks, so that its template says what a turn looks like."""
    sizes = Slm.preset("small").connector
    preset = Slm.preset("tiny")
    marks = {"before": sizes["before"], "behind": sizes["behind"]}
    model = Slm.build(preset.model_copy(update={"connector": preset.connector | marks}), TOKENIZER, encoders=False)
    rendered, _ = pairs(model, answers=False)[0]
    text = [token for at, token in enumerate(rendered.ids) if at not in rendered.audio_at]
    chat = [{"role": "user", "content": "Write it."}]
    assert TOKENIZER.decode(text) == TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.audio_at == [6, 7, 8]  # a mark and the five bytes of "user\n" stand before: in front of the request


def test_three_of_four_frames_are_discarded(model: Slm) -> None:
    frames, lengths = clip(9).features["speech"][None], {"speech": torch.tensor([9])}
    tokens, counts = model.connect({"speech": frames}, lengths)
    assert (tokens.shape[1], counts.tolist()) == (3, [3])
    others = frames.clone()
    others[0, [1, 2, 3, 5, 6, 7]] = 9.0
    assert torch.equal(model.connect({"speech": others}, lengths)[0], tokens)
    others[0, 4] = 9.0
    assert not torch.allclose(model.connect({"speech": others}, lengths)[0], tokens, atol=1e-3)


# ---- the encoder-decoder ---------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers_with_labels(model: Slm) -> None:
    """Each sample alone through transformers' own forward: source embeddings, labels, its shift to the right."""
    for pair in pairs(model):
        loss, count = model(batch_of([pair]))
        embedded, _ = model.embed(batch_of([pair]))
        answer = [label for label in pair[0].labels if label != IGNORED]
        source = embedded[:, : len(pair[0]) - len(answer)]
        theirs = model.llm(inputs_embeds=source, labels=torch.tensor([answer])).loss
        assert int(count) == len(answer)
        assert float(loss.detach() / count) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_the_answer_is_no_part_of_the_source(model: Slm) -> None:
    """In a causal backbone it would be: the last state of the decoder depends on audio and on what was said before."""
    rendered, clips = pairs(model)[0]
    before, _ = model.run(batch_of([(rendered, clips)]))
    last = len(rendered) - 1
    changed = Rendered(**vars(rendered))
    changed.ids = [*rendered.ids[:last], EOS + 5]
    changed.labels = [*rendered.labels[:last], EOS + 5]
    after, _ = model.run(batch_of([(changed, clips)]))
    assert torch.equal(before, after)
    after, _ = model.run(batch_of([(rendered, [clip(11, seed=8)])]))
    assert not torch.allclose(before[0, last - 1], after[0, last - 1], atol=1e-3)


def test_gradients_flow_through_the_frozen_model_to_the_adapter(model: Slm) -> None:
    model.freeze(("connector",))
    model.train()
    assert not model.llm.training
    model(batch_of(pairs(model)))[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.connector.parameters())
    assert all(p.grad is None for p in model.llm.parameters())


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(beams=3)], ids=["greedy", "beams"])
def test_answers_do_not_depend_on_the_batch(model: Slm, decoding: Decoding) -> None:
    prompts = pairs(model, answers=False)
    together = model.generate(batch_of(prompts, "left"), decoding, TOKENIZER, 8)
    alone = [model.generate(batch_of([prompt], "left"), decoding, TOKENIZER, 8)[0] for prompt in prompts]
    assert together == alone
    assert all(0 < len(ids) <= 8 for ids in together)


def test_greedy_answers_are_what_the_training_path_finds_likeliest(model: Slm) -> None:
    """Token by token through `run`, without transformers' generation: the start token is the right one."""
    (rendered, clips), *_ = pairs(model, answers=False)
    generated = model.generate(batch_of([(rendered, clips)], "left"), Decoding(), TOKENIZER, 5)[0]
    found: list[int] = []
    for _ in range(len(generated)):
        whole = Rendered(list(rendered.ids), list(rendered.labels), rendered.audio_at, rendered.clip_at, [3])
        whole.tokens([*found, EOS], learn=True)
        states, _ = model.run(batch_of([(whole, clips)]))
        logits: Tensor = model.llm.get_output_embeddings()(states[0, -2])
        found.append(int(logits.argmax()))
    assert found == generated


def text_only(request: str, answer: str = "") -> Pair:
    rendered = Rendered().text(TOKENIZER, request).tokens([EOS])
    return (rendered.text(TOKENIZER, answer, learn=True).tokens([EOS], learn=True) if answer else rendered), []


def test_text_alone_is_answered_and_learnt(model: Slm) -> None:
    """No clip in the batch: what the language model makes of text is what it made of it before."""
    prompts = [text_only("Hello"), text_only("How are you?")]
    together = model.generate(batch_of(prompts, "left"), Decoding(), TOKENIZER, 6)
    for (rendered, _), ids in zip(prompts, together, strict=True):
        theirs = model.llm.generate(torch.tensor([rendered.ids]), max_new_tokens=6, eos_token_id=EOS)[0, 1:].tolist()
        assert ids == theirs[: theirs.index(EOS) if EOS in theirs else None]
    samples = [text_only("Hello", "there"), text_only("How are you?", "fine")]
    losses = [float(model(batch_of([sample]))[0].detach()) for sample in samples]
    assert float(model(batch_of(samples, "packed"))[0].detach()) == pytest.approx(sum(losses), rel=1e-5)


# ---- mT5's output layer ----------------------------------------------------------------------------------------


def test_the_output_layer_is_no_copy_of_the_embeddings_and_both_are_kept(tmp_path: Path) -> None:
    model = Slm.build(Slm.preset("tiny"), TOKENIZER)
    tables = model.llm.get_input_embeddings().weight, model.llm.get_output_embeddings().weight
    assert tables[0] is not tables[1]
    with torch.no_grad():
        tables[1].normal_()
    model.save_pretrained(tmp_path)
    loaded = Slm.from_pretrained(tmp_path)
    assert torch.equal(loaded.llm.get_input_embeddings().weight, tables[0])
    assert torch.equal(loaded.llm.get_output_embeddings().weight, tables[1])
    assert loaded.llm.encoder.embed_tokens.weight is loaded.llm.shared.weight


def test_a_published_mt5_keeps_its_output_layer(model: Slm, tmp_path: Path) -> None:
    """A folder as Google publishes them: two tables, and the embeddings of encoder and decoder shared."""
    with torch.no_grad():
        model.llm.get_output_embeddings().weight.normal_()
    model.llm.save_pretrained(tmp_path)
    preset = Slm.preset("tiny")
    backbone = preset.backbone.model_copy(update={"weights": str(tmp_path)})
    built = Slm.build(preset.model_copy(update={"backbone": backbone}), TOKENIZER, encoders=False)
    for name, value in model.llm.state_dict().items():
        assert torch.equal(built.llm.state_dict()[name], value), name
