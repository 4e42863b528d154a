"""A tiny speech LLM with twelve ragged clips, stages for it, and runs of them, for the tests of components/training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from components.batching.loader import stage_data
from components.batching.plan import Layout
from components.training.checkpoint import Checkpoints
from components.training.compute import Compute
from components.training.history import read_metrics
from components.training.loop import Alone, Scheduler, StageLoop, train_stage
from components.training.weights import load_tensors, load_weights
from infra import storage
from models.architectures import load
from models.contract import SpeechLLM
from models.pretrained import load_tokenizer
from models.recipe import Optimiser, Stage
from models.rendering import Audio

TEXTS = (  # of 2 to 44 letters: what one worker has in labels, another has many times over
    *("no", "turn on the light in the kitchen, please", "stop", "what is the weather going to be like tomorrow"),
    *("left", "play the song again", "yes", "how many minutes until the next train leaves"),
    *("up", "louder", "remind me to water the plants", "off"),
)
DEV_TEXTS = ("down", "open the window", "go")
TIMED = ("tokens_per_second", "samples_per_second", "data_wait", "mfu")  # fields that no two runs have alike


@dataclass(frozen=True)
class Built:
    """A model, its tokenizer and what its encoders would make of the clips."""

    model: SpeechLLM
    tokenizer: Any
    audios: dict[str, Audio]


class Eyes(Alone):
    """Keeps the weights after every step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.seen: list[dict[str, Tensor]] = []

    def report(self, metrics: dict[str, Any]) -> None:
        learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.seen.append({n: p.detach().clone() for n, p in learning.items()})


def make_row(key: str, text: str) -> dict[str, Any]:
    return {
        "key": key,
        "text": text,
        "seconds": 0.4 + 0.05 * len(text),
        "labels": {},
        "translation": {},
        "caption": None,
        "conversations": None,
        "original": f"books/{key}.wav",
        "shard": "shard-000000.tar",
    }


ROWS = [make_row(f"c{i}", text) for i, text in enumerate(TEXTS)]
DEV = [make_row(f"d{i}", text) for i, text in enumerate(DEV_TEXTS)]


def built(dropout: float = 0.0, seed: int = 1, layers: int = 2) -> Built:
    """funasr_llm, tiny: the same arguments give the same weights and features."""
    architecture = load("funasr_llm")
    preset = architecture.preset("tiny")
    assert preset.lora is not None
    preset.lora.dropout = dropout
    preset.backbone.config = preset.backbone.config | {"num_hidden_layers": layers}
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    model = architecture.build(preset, tokenizer, encoders=False, seed=seed)
    generator = torch.Generator().manual_seed(5)
    audios = {
        row["key"]: Audio({"speech": torch.randn(12 + 3 * len(row["text"]), 32, generator=generator)})
        for row in [*ROWS, *DEV]
    }
    return Built(model, tokenizer, audios)


def make_stage(loss: str = "lm", **given: Any) -> Stage:
    """Three epochs of four or five batches; checkpoints at every second step."""
    plain: dict[str, Any] = {
        "name": "align" if loss == "ctc" else "tune",
        "train": ("connector",) if loss == "ctc" else ("connector", "lora"),
        "loss": loss,
        "optimiser": Optimiser(lr=5e-3, warmup=2),
        "epochs": 3,
        "batch_tokens": 500,
        "checkpoint_every": 2,
    }
    return Stage(**(plain | given))


def make_loop(
    url: Path | str,
    stage: Stage,
    parts: Built | None = None,
    *,
    layout: Layout = "bucketed",
    scheduler: Scheduler | None = None,
    rows: Sequence[dict[str, Any]] = ROWS,
    dev: Sequence[dict[str, Any]] = (),
    **compute: Any,
) -> StageLoop:
    """A stage ready to be trained by `train_stage`; further names are settings of `Compute`, float32 if not said."""
    parts = parts or built()
    read = parts.audios.__getitem__
    model, tokenizer = parts.model, parts.tokenizer
    once = stage.model_copy(update={"epochs": 1.0, "max_steps": None})
    return StageLoop(
        stage=stage,
        data=stage_data(stage, rows, model, tokenizer, read, seed=0, layout=layout),
        model=model,
        tokenizer=tokenizer,
        url=str(url),
        seed=0,
        scheduler=scheduler or Alone(),
        compute=Compute(**({"precision": "float32"} | compute)),
        held_out=stage_data(once, dev, model, tokenizer, read, seed=0, layout=layout) if dev else None,
    )


def trained(url: Path | str, stage: Stage | None = None, parts: Built | None = None, **given: Any) -> dict[str, Tensor]:
    """Train a stage to its end (`given` as for `make_loop`); the weights that it published."""
    train_stage(make_loop(url, stage or make_stage(), parts, **given), [])
    return final(url)


def final(url: Path | str) -> dict[str, Tensor]:
    return load_tensors(storage.join(str(url), "weights.safetensors"))


def two_stages(url: Path | str, parts: Built, **given: Any) -> None:
    """CTC, then next-token loss from its weights, each in a folder; a stage that was published is not trained again."""
    before: list[str] = []
    for stage in (make_stage("ctc"), make_stage()):
        folder = storage.join(str(url), stage.name)
        weights = storage.join(folder, "weights.safetensors")
        if storage.exists(weights):
            before = load_weights(weights, parts.model)
        else:
            before = train_stage(make_loop(folder, stage, parts, **given), before)


def curve(url: Path | str, field: str = "loss") -> list[Any]:
    """A field of the metrics at every step; the steps must be those of an unbroken run."""
    lines = read_metrics(str(url))
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line[field] for line in lines]


def untimed(url: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics without what a clock measured."""
    return [{n: value for n, value in line.items() if n not in TIMED} for line in read_metrics(str(url))]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights, relative to the norm of each tensor."""
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / left[n].norm().clamp(min=1e-12)) for n in left)


class Stopped(Exception):
    """Stands for the end of a process in the middle of a stage."""


class StopAt(Alone):
    """A scheduler under which a run ends after a step, on every rank."""

    def __init__(self, step: int | None, rank: int = 0, world: int = 1) -> None:
        self.step, self.rank, self.world = step, rank, world

    def report(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            raise Stopped


def stopped(step: int, url: Path | str, stage: Stage | None = None, parts: Built | None = None, **given: Any) -> None:
    """Begin a stage and end after a step, when the checkpoints up to there are written."""
    save = Checkpoints.save

    def save_and_wait(self: Checkpoints, *args: Any) -> None:
        save(self, *args)
        self.wait()

    with mock.patch.object(Checkpoints, "save", save_and_wait), pytest.raises(Stopped):
        trained(url, stage, parts, **({"scheduler": StopAt(step)} | given))
