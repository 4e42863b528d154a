"""Every architecture on its `tiny` preset: found, never listed, so that a new file is tested without being named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from components.batching.loader import StageData, stage_data, stage_examples
from components.batching.measure import ReadAudio
from components.curriculum.examples import Examples
from components.curriculum.tasks import TaskSample, select
from models.architectures import load, names
from models.batch import Pair
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import load_tokenizer
from models.recipe import Stage
from models.rendering import Audio

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

    def rendered(self, stage: Stage) -> list[Pair]:
        """All samples of a stage as it would train on them."""
        read = self.read(stage)
        pairs: list[Pair] = []
        for row in ROWS:
            for sample in self.examples(stage).samples(row, stage.tasks, stage.phrasings):
                clips = [read(key) for key in sample.keys]
                pairs.append((self.model.render(self.tokenizer, list(sample.messages), clips), clips))
        return pairs

    def examples(self, stage: Stage) -> Examples:
        return stage_examples(stage, ROWS, self.model, self.audios.__getitem__)

    def read(self, stage: Stage) -> ReadAudio:
        """Where a stage's audio comes from; stages that are not in the recipe take features."""
        recipe = self.preset.recipe
        hears = stage in recipe.stages and recipe.hears[recipe.stages.index(stage)]
        return (self.heard() if hears else self.audios).__getitem__

    def data(self, stage: Stage, seed: int = 0, rows: list[dict[str, Any]] = ROWS) -> StageData:
        return stage_data(stage, rows, self.model, self.tokenizer, self.read(stage), seed)

    def heard(self) -> dict[str, Audio]:
        """The same clips as a stage that trains an encoder gets them."""
        encoders = {role: self.model.encoder(role) for role in self.model.encoders}
        return {
            key: Audio(waveform=wave, counts={role: e.output_length(len(wave)) for role, e in encoders.items()})
            for key, wave in zip(self.audios, self.waveforms, strict=True)
        }


@pytest.fixture(params=names())
def subject(request: pytest.FixtureRequest) -> Subject:
    return built(request.param)


def built(name: str) -> Subject:
    """An architecture on `tiny`; the same weights and clips every time."""
    architecture = load(name)
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
