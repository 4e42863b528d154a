"""COSMIC: the parameter budget, token rates, and prompts that hold several clips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.curriculum.tasks import samples_of
from models.architectures import load
from models.architectures.cosmic import Cosmic
from models.batch import Layout, Pair, collate
from models.contract import SpeechLLM
from models.encoders import build_encoder
from models.pretrained import load_tokenizer
from models.rendering import IGNORED, Audio, Message, Rendered

TOKENIZER: Any = load_tokenizer("bytes")
TEXTS = ("stop", "turn on the light", "louder")
ROWS: list[dict[str, Any]] = [
    {"key": f"c{i}", "text": text, "labels": {}, "translation": {}, "caption": None, "conversations": None}
    for i, text in enumerate(TEXTS)
]


def trainable(model: SpeechLLM, *groups: str) -> int:
    named = set(model.freeze(groups))
    return sum(p.numel() for name, p in model.named_parameters() if name in named)


def tiny() -> SpeechLLM:
    return load("cosmic").build(Cosmic.preset("tiny"), TOKENIZER, seed=3)


def clips_of(model: SpeechLLM) -> dict[str, Audio]:
    generator = torch.Generator().manual_seed(1)
    waves = [torch.randn(5000 + 4000 * i, generator=generator) * 0.1 for i in range(len(ROWS))]
    return dict(zip([row["key"] for row in ROWS], model.listen(waves), strict=True))


def shown(model: SpeechLLM, own: int, *others: int) -> Pair:
    """A clip that is asked about behind examples."""
    audios = clips_of(model)
    sample = samples_of(ROWS[own], "asr", others=[ROWS[i] for i in others])[0]
    clips = [audios[key] for key in sample.keys]
    return model.render(TOKENIZER, list(sample.messages), clips), clips


def spans(rendered: Rendered) -> list[str]:
    """The text between clips."""
    ends = [at + n for at, n in zip(rendered.clip_at, rendered.clip_tokens, strict=True)]
    edges = zip([0, *ends], [*rendered.clip_at, len(rendered)], strict=True)
    return [TOKENIZER.decode(rendered.ids[start:end]) for start, end in edges]


def test_fewer_than_thirty_million_parameters_learn() -> None:
    model = Cosmic.on_meta(Cosmic.preset("paper"))
    assert trainable(model, "lora") == 4_194_304
    sizes = {name: p.numel() for name, p in model.connector.named_parameters()}
    assert sum(n for name, n in sizes.items() if name.startswith("qformer.encoder")) == 20_476_416
    assert sum(n for name, n in sizes.items() if name.startswith("proj")) == 3_149_824
    assert trainable(model, "connector") == 23_631_104
    assert trainable(model, "connector", "lora") == 27_825_408 < 30_000_000


@pytest.mark.parametrize(("seconds", "tokens"), [(30, 88), (10, 29), (1, 2)])
def test_a_token_every_seventeen_frames(seconds: int, tokens: int) -> None:
    preset = Cosmic.preset("paper").without_weights()
    with torch.device("meta"):
        encoder = build_encoder(preset.encoders["speech"])
        model = Cosmic.on_meta(preset)
    assert model.audio_tokens({"speech": encoder.output_length(seconds * 16_000)}) == tokens


def test_examples_are_turns_with_their_own_clips_and_answers() -> None:
    model = tiny()
    rendered, clips = shown(model, 0, 2, 1)
    request = "Transcribe speech to text."
    assert spans(rendered) == [
        "<|im_start|>[INST]",
        f" {request} [/INST] louder<|im_end|><|im_start|>[INST]",
        f" {request} [/INST] turn on the light<|im_end|><|im_start|>[INST]",
        f" {request} [/INST] stop<|im_end|>",
    ]
    assert rendered.clip_tokens == [model.audio_tokens(clip.frames) for clip in clips]
    assert len(set(rendered.clip_tokens)) == 3


def test_only_the_last_answer_carries_loss() -> None:
    rendered, _ = shown(tiny(), 0, 2, 1)
    learnt = [label for label in rendered.labels if label != IGNORED]
    assert TOKENIZER.decode(learnt) == " stop<|im_end|>"
    assert rendered.labels[-len(learnt) :] == learnt


def test_a_prompt_with_an_example_is_the_beginning_of_what_is_trained_on() -> None:
    model = tiny()
    audios = clips_of(model)
    sample = samples_of(ROWS[0], "asr", others=ROWS[1:2])[0]
    clips = [audios[key] for key in sample.keys]
    whole = model.render(TOKENIZER, list(sample.messages), clips)
    prompt = model.render(TOKENIZER, sample.prompt(), clips)
    assert whole.ids[: len(prompt)] == prompt.ids
    assert whole.ids[len(prompt) :] == [*TOKENIZER(" stop", add_special_tokens=False)["input_ids"], 2]
    assert prompt.clip_at == whole.clip_at


def test_turns_without_audio_take_no_clip() -> None:
    model = tiny()
    clip = next(iter(clips_of(model).values()))
    messages: list[Message] = [
        {"role": "user", "content": "Be short."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is said?"}]},
    ]
    rendered = model.render(TOKENIZER, messages, [clip])
    assert spans(rendered)[0] == "<|im_start|>[INST] Be short. [/INST] yes<|im_end|><|im_start|>[INST]"


@torch.no_grad()
def test_prompts_with_different_numbers_of_clips_agree_in_every_layout() -> None:
    model = tiny()
    pairs = [shown(model, 0, 2), shown(model, 1), shown(model, 2, 0, 1)]
    alone = [model.hidden(collate([pair], 0))[0] for pair in pairs]
    layouts: tuple[Layout, ...] = ("right", "left", "packed")
    for layout in layouts:
        batch = collate(pairs, 0, layout)
        assert batch.clip_segments().tolist() == [1, 1, 2, 3, 3, 3]
        found = model.hidden(batch)
        for i, expected in enumerate(alone):
            assert torch.allclose(found[batch.segments == i + 1], expected, atol=1e-5), layout


@torch.no_grad()
def test_the_answer_depends_on_the_clip_of_the_example() -> None:
    model = tiny()
    rendered, clips = shown(model, 0, 1)
    before = model.hidden(collate([(rendered, clips)], 0))[0, -1]
    other = Audio(
        {"speech": torch.randn(clips[0].features["speech"].shape, generator=torch.Generator().manual_seed(2))}
    )
    after = model.hidden(collate([(rendered, [other, clips[1]])], 0))[0, -1]
    assert not torch.allclose(before, after, atol=1e-4)


def test_words_for_biasing_stand_in_the_request() -> None:
    model = tiny()
    sample = samples_of(ROWS[0], "biased_asr", others=ROWS[1:])[0]
    rendered = model.render(TOKENIZER, list(sample.messages), [clips_of(model)["c0"]])
    listed = "light, louder, stop, the, turn"
    assert spans(rendered)[1] == f" These words may occur: {listed}. Transcribe speech to text. [/INST] stop<|im_end|>"
