"""Every architecture on its `tiny` preset: found, never listed, so that a new file is tested without being named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from components.curriculum.tasks import TaskSample, select
from models.architectures import load, names
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import load_tokenizer
from models.rendering import Audio, Rendered

ROWS = [
    {
        "key": f"clip{i}",
        "text": text,
        "seconds": seconds,
        "labels": {"room": room},
        "translation": {"de": "das licht"},
        "caption": f"a voice in the {room}",
        "conversations": [
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Answer."}]},
            {"role": "assistant", "content": f"okay, the {room}"},
        ],
    }
    for i, (text, seconds, room) in enumerate(
        [("turn on the light", 1.0, "kitchen"), ("stop", 0.6, "hall"), ("what is the weather today", 1.7, "garden")]
    )
]


@dataclass
class Subject:
    """One architecture, built tiny, with three clips and what its encoders make of them."""

    architecture: type[SpeechLLM]
    preset: Preset
    model: SpeechLLM
    tokenizer: Any
    waveforms: list[Tensor]
    audios: dict[str, Audio]

    def samples(self, tasks: dict[str, float]) -> list[TaskSample]:
        return select(ROWS, tasks)

    def rendered(self, tasks: dict[str, float]) -> list[tuple[Rendered, Audio]]:
        pairs = []
        for sample in self.samples(tasks):
            audio = self.audios[sample.key]
            rendered = self.model.render(self.tokenizer, list(sample.messages), audio)
            pairs.append((rendered, audio if rendered.audio_at else Audio()))
        return pairs


@pytest.fixture(params=names())
def subject(request: pytest.FixtureRequest) -> Subject:
    architecture = load(request.param)
    preset = architecture.preset("tiny")
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(architecture.added_tokens(preset))
    model = architecture.build(preset, tokenizer, seed=3)
    generator = torch.Generator().manual_seed(7)
    if model.codebook is not None:
        model.codebook.data.normal_(generator=generator)
    waveforms = [torch.randn(int(row["seconds"] * 16_000), generator=generator) * 0.1 for row in ROWS]
    audios = dict(zip([row["key"] for row in ROWS], model.listen(waveforms), strict=True))
    return Subject(architecture, preset, model, tokenizer, waveforms, audios)
