"""Audio Flamingo: published counts, prompts with examples and dialogues, who sees which windows, the released file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.curriculum.tasks import samples_of
from models.architectures.audio_flamingo import AudioFlamingo, silence_of, with_spare_rows
from models.batch import Pair, collate
from models.checkpoints import import_into
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message, Rendered

TOKENIZER: Any = load_tokenizer("bytes")
TOKENIZER.add_tokens(AudioFlamingo.added_tokens(AudioFlamingo.preset("tiny")))
ROWS: list[dict[str, Any]] = [
    {"key": f"c{i}", "text": None, "labels": {}, "translation": {}, "caption": text, "conversations": None}
    for i, text in enumerate(("A bell", "Rain", "A dog barks"))
]
WINDOWS = (1, 3, 5)  # of the three clips: 0.4 s, then one each 0.2 s
REQUEST = "describe the audio in one sentence.\nAnswer:"


def tiny() -> AudioFlamingo:
    return AudioFlamingo.build(AudioFlamingo.preset("tiny"), TOKENIZER, seed=3)


def opened(model: AudioFlamingo) -> AudioFlamingo:
    with torch.no_grad():
        for name, parameter in model.listener.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(1.0)
    return model


def clips_of(model: AudioFlamingo) -> list[Audio]:
    generator = torch.Generator().manual_seed(6)
    clips = model.listen([0.2 * torch.randn(n, generator=generator) for n in (6400, 12800, 32000)])
    assert tuple(len(clip.features["audio"]) for clip in clips) == WINDOWS
    return clips


def shown(model: AudioFlamingo, own: int, *others: int) -> Pair:
    """A caption of a clip behind those of others."""
    clips = clips_of(model)
    sample = samples_of(ROWS[own], "caption", others=[ROWS[i] for i in others])[0]
    heard = [clips[int(key[1:])] for key in sample.keys]
    return model.render(TOKENIZER, list(sample.messages), heard), heard


def pieces(rendered: Rendered, learnt: bool = False) -> str:
    ids = rendered.ids if not learnt else [label for label in rendered.labels if label != IGNORED]
    return str(TOKENIZER.decode(ids)).replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")


def dialogue(rounds: int, open_end: bool = False) -> list[Message]:
    said: list[Message] = []
    for number in range(rounds):
        audio = [{"type": "audio"}] if number == 0 else []
        said.append({"role": "user", "content": [*audio, {"type": "text", "text": f"What Now {number}?"}]})
        said.append({"role": "assistant", "content": f"Rain {number}."})
    return said[:-1] if open_end else said


# ---- what was published ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> AudioFlamingo:
    return AudioFlamingo.on_meta(AudioFlamingo.preset("paper"))


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_published_sizes(paper: AudioFlamingo) -> None:
    """2.2 B in all: OPT with rows for three more tokens, and what pre-training learns."""
    assert count(paper.listener.audio_transformer.parameters()) == 25_189_376
    assert [count(block.parameters()) for block in paper.listener.blocks.values()] == [36_708_354] * 24
    learnt = set(paper.trained_by(("connector",)))
    assert count(p for name, p in paper.named_parameters() if name in learnt) == 25_189_376 + 24 * 36_708_354
    assert count(paper.llm.parameters()) == 1_315_758_080 + 3 * 2048
    assert count(paper.llm.parameters()) + count(paper.listener.parameters()) == pytest.approx(2.2e9, rel=0.01)
    stages = AudioFlamingo.preset("paper").recipe.stages
    assert [stage.train for stage in stages] == [("connector",), ("connector", "llm"), ("connector", "llm")]


def test_places_for_eight_clips_of_sixteen_windows(paper: AudioFlamingo) -> None:
    assert paper.listener.audio_transformer.position_enc.pos_table.shape == (1, 128, 1024)
    sft = AudioFlamingo.preset("paper").recipe.stages[1]
    assert (sft.shots + 1, sft.nearest) == (paper.listener.clips, True)
    with torch.device("meta"):
        encoder = build_encoder(AudioFlamingo.preset("paper").without_weights().encoders["audio"])
    assert [encoder.output_length(round(16_000 * seconds)) for seconds in (5, 8.75, 33.25, 60)] == [1, 2, 16, 16]


# ---- sequences ------------------------------------------------------------------------------------------------------


def test_a_single_request() -> None:
    rendered, _ = shown(tiny(), 0)
    assert pieces(rendered) == f"<s><s><audio>{REQUEST}<SEP>a bell<|endofchunk|></s>"
    assert pieces(rendered, learnt=True) == "a bell<|endofchunk|></s>"
    assert rendered.clip_at == [2]
    assert rendered.clip_tokens == [0]


def test_examples_come_first_and_every_output_is_learnt() -> None:
    rendered, _ = shown(tiny(), 2, 0, 1)
    assert pieces(rendered) == (
        "<s><s>Here are similar examples. "
        f"<audio>{REQUEST}<SEP>a bell<|endofchunk|>"
        f"<audio>{REQUEST}<SEP>rain<|endofchunk|>"
        f"<audio>{REQUEST}<SEP>a dog barks<|endofchunk|></s>"
    )
    assert pieces(rendered, learnt=True) == "a bell<|endofchunk|>rain<|endofchunk|>a dog barks<|endofchunk|></s>"
    audio = TOKENIZER.convert_tokens_to_ids("<audio>")
    assert rendered.clip_at == [at for at, token in enumerate(rendered.ids) if token == audio]


def test_a_dialogue_keeps_its_case_and_ends_every_turn() -> None:
    model = tiny()
    rendered = model.render(TOKENIZER, dialogue(2), clips_of(model)[:1])
    assert pieces(rendered) == (
        "<s><s>The task is dialog. <audio>user: What Now 0? \nassistant: <SEP>Rain 0.<|endofchunk|></s>"
        "\nuser: What Now 1? \nassistant: <SEP>Rain 1.<|endofchunk|></s>"
    )
    assert pieces(rendered, learnt=True) == "Rain 0.<|endofchunk|></s>Rain 1.<|endofchunk|></s>"
    prompt = model.render(TOKENIZER, dialogue(2, open_end=True), clips_of(model)[:1])
    assert rendered.ids[: len(prompt)] == prompt.ids
    assert pieces(prompt).endswith("assistant: <SEP>")


def test_more_clips_than_places_are_refused() -> None:
    model = tiny()
    turn = dialogue(1)
    with pytest.raises(ValueError, match="hears at most 3 clips in a prompt; use fewer shots"):
        model.render(TOKENIZER, turn * 4, clips_of(model)[:1] * 4)


def test_an_answer_ends_with_its_chunk() -> None:
    end = TOKENIZER.convert_tokens_to_ids("<|endofchunk|>")
    assert tiny().end_tokens(TOKENIZER) == [TOKENIZER.eos_token_id, end]


# ---- windows --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_transformer_sees_all_windows_of_a_sample_and_silence_in_the_other_places() -> None:
    """Side by side, five places a clip; compared with the transformer alone, places filled by hand."""
    model = tiny()
    _, heard = pair = shown(model, 1, 0)
    media = model.media(*collated(model, [pair]))
    silence = model.listener.silence
    places = silence.repeat(15, 1)
    first, second = (clip.features["audio"] for clip in heard)
    places[:1], places[5:8] = first, second
    transformer = model.listener.audio_transformer
    mixed = transformer(places[None], torch.tensor([15]))[0][0]
    assert torch.allclose(media.vectors[0], torch.cat([mixed[:1], mixed[5:8]]), atol=1e-5)
    alone = model.media(*collated(model, [shown(model, 0)]))
    assert (alone.vectors[0] - media.vectors[0, :1]).abs().max() > 1e-4  # the other clip changed the first


def collated(model: AudioFlamingo, pairs: list[Pair], layout: Any = "right") -> tuple[Any, Tensor, Tensor]:
    batch = collate(pairs, TOKENIZER.pad_token_id, layout)
    return batch, *model.connect(*model.sound(batch))


def test_silence_is_what_the_encoder_makes_of_it() -> None:
    model = tiny()
    zeros = model.listen([torch.zeros(20_000)])[0].features["audio"]
    assert torch.equal(model.listener.silence, zeros[2])
    assert torch.equal(model.listener.silence, silence_of(model.encoder("audio")))
    from_cache = AudioFlamingo.build(AudioFlamingo.preset("tiny"), TOKENIZER, encoders=False, seed=3)
    assert torch.equal(from_cache.listener.silence, zeros[2])


def test_a_token_sees_the_clips_before_it_and_text_before_the_first_sees_that_one() -> None:
    model = tiny()
    pair = shown(model, 2, 0, 1)
    media = model.media(*collated(model, [pair]))
    starts = [0, *pair[0].clip_at[1:], len(pair[0])]
    assert media.visible.shape == (1, len(pair[0]), sum(WINDOWS))
    for clip in range(3):
        seen = sum(WINDOWS[: clip + 1])
        for token in range(starts[clip], starts[clip + 1]):
            expected = [True] * seen + [False] * (sum(WINDOWS) - seen)
            assert media.visible[0, token].tolist() == expected


def test_in_a_packed_row_nobody_sees_windows_of_another_sample() -> None:
    model = tiny()
    pairs = [shown(model, 1, 0), (Rendered().text(TOKENIZER, "hello", learn=True), []), shown(model, 2)]
    batch, windows, counts = collated(model, pairs, "packed")
    visible = model.media(batch, windows, counts).visible[0]
    assert visible[batch.segments[0] == 1, 4:].sum() == 0
    assert visible[batch.segments[0] == 2].sum() == 0
    assert visible[batch.segments[0] == 3].tolist() == [[False] * 4 + [True] * 5] * len(pairs[2][0])
    padded = model.media(*collated(model, pairs, "left"))
    assert padded.vectors.shape[:2] == (3, 5)
    assert padded.visible[0].sum() == visible[batch.segments[0] == 1].sum()
    assert padded.visible[1].sum() == 0


@torch.no_grad()
def test_examples_change_what_is_said_about_the_last_clip() -> None:
    model = opened(tiny())
    batches = [collate([shown(model, 2, *others)], TOKENIZER.pad_token_id) for others in ((0, 0), (0, 1))]
    first, second = (model.hidden(batch)[0, -3:] for batch in batches)
    assert (first - second).abs().max() > 1e-4


def test_not_every_layer_needs_one() -> None:
    preset = AudioFlamingo.preset("tiny")
    sparse = preset.model_copy(update={"connector": preset.connector | {"every": 2}})
    assert list(AudioFlamingo.on_meta(sparse).listener.blocks) == ["1"]


# ---- the released file ----------------------------------------------------------------------------------------------


def official(model: AudioFlamingo) -> dict[str, Tensor]:
    """A file of the released layout: fact sheet a.md, section 5A (7)."""
    generator = torch.Generator().manual_seed(9)
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        theirs = name.replace("connector.audio_transformer.", "audio_transformer.")
        theirs = theirs.replace("llm.model.decoder.layers.", "lang_encoder.model.decoder.layers.")
        theirs = theirs.replace("llm.", "lang_encoder.")
        parts = theirs.split(".")
        if theirs.startswith("connector.blocks."):
            theirs = f"lang_encoder.model.decoder.layers.{parts[2]}.gated_cross_attn_layer.{'.'.join(parts[3:])}"
        elif ".decoder.layers." in theirs:
            theirs = ".".join([*parts[:5], "decoder_layer", *parts[5:]])
        if theirs.startswith(("lang_encoder", "audio_transformer")):
            found[theirs] = torch.randn(value.shape, generator=generator)
    found["lang_encoder.lm_head.weight"] = found["lang_encoder.model.decoder.embed_tokens.weight"]
    return found


def test_every_tensor_of_the_released_file_arrives(tmp_path: Path) -> None:
    model = tiny()
    silence = model.listener.silence.clone()
    state = official(model)
    again = {
        "lang_encoder.old_decoder_blocks.0.fc1.weight": torch.ones(2),
        "lang_encoder.gated_cross_attn_layers.0.attn_gate": torch.ones(1),
        "clap.ms_clap.clapcap.clap.base.htsat.bn0.weight": torch.ones(2),
    }
    wrapped = {f"module.{name}": value for name, value in (state | again).items()}
    torch.save({"epoch": 3, "model_state_dict": wrapped}, tmp_path / "foundation.pt")
    report = import_into(model, AudioFlamingo.checkpoint, tmp_path / "foundation.pt")
    assert len(report.ignored) == 3
    ours = model.state_dict()
    left = {name for name in ours if not name.startswith("encoders")} - set(report.loaded)
    assert left == {"connector.silence"}
    assert torch.equal(model.listener.silence, silence)
    layers = "lang_encoder.model.decoder.layers"
    for theirs, name in (
        (f"{layers}.1.gated_cross_attn_layer.attn.to_kv.weight", "connector.blocks.1.attn.to_kv.weight"),
        (f"{layers}.0.gated_cross_attn_layer.ff.3.weight", "connector.blocks.0.ff.3.weight"),
        (f"{layers}.1.gated_cross_attn_layer.ff_gate", "connector.blocks.1.ff_gate"),
        (f"{layers}.1.decoder_layer.self_attn.k_proj.bias", "llm.model.decoder.layers.1.self_attn.k_proj.bias"),
        ("lang_encoder.model.decoder.embed_positions.weight", "llm.model.decoder.embed_positions.weight"),
        (
            "audio_transformer.layer_stack.0.slf_attn.w_qs.weight",
            "connector.audio_transformer.layer_stack.0.slf_attn.w_qs.weight",
        ),
    ):
        assert torch.equal(ours[name], state[theirs]), name


def test_the_official_table_is_shorter_than_opts() -> None:
    table = torch.randn(50_268, 2)
    padded = with_spare_rows(table)
    assert padded.shape == (50_272, 2)
    assert torch.equal(padded[:50_268], table)
    assert torch.equal(with_spare_rows(table[:9]), table[:9])
