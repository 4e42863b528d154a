"""From a plan to batches: reads features, renders conversations, lays rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from components.batching.plan import Plan, plan_stage, rank_slice
from components.curriculum.tasks import TaskSample, generic_name, select
from models.batch import Batch, collate
from models.contract import SpeechLLM
from models.recipe import Stage
from models.rendering import IGNORED, Audio, Rendered

ReadAudio = Callable[[str], Audio]  # key of a clip -> its cached features or units


@dataclass(frozen=True)
class StageData:
    """The samples of a stage, their plan, and how to read them."""

    samples: tuple[TaskSample, ...]
    seconds: np.ndarray
    plan: Plan
    read: ReadAudio
    pad_id: int
    layout: str

    def shares(self, step: int) -> dict[str, float]:
        """Share of each task in a global batch."""
        tasks = [self.samples[i].task for i in self.plan.batches[step]]
        return {task: tasks.count(task) / len(tasks) for task in sorted(set(tasks))}


def stage_data(stage: Stage, rows: Sequence[dict], model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, read: ReadAudio, seed: int) -> StageData:
    """Select, measure and order the samples of a stage. The result may hold no batch if no row has the fields."""
    samples = select(rows, stage.tasks)
    seconds_of = {row["key"]: row["seconds"] for row in rows}
    lengths = np.array([len(model.render(tokenizer, list(s.messages), read(s.key))) for s in samples], dtype=np.int64)
    weights = np.array([stage.tasks.get(s.task, stage.tasks.get(generic_name(s.task), 0.0)) for s in samples])
    seconds = np.array([seconds_of[s.key] for s in samples])
    difficulty = seconds if stage.curriculum.order == "duration" else np.array([float(len(s.reference)) for s in samples])
    plan = plan_stage(stage, lengths, weights, difficulty, seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return StageData(tuple(samples), seconds, plan, read, int(pad), stage.layout)


def load_batch(data: StageData, step: int, model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, rank: int, world: int) -> Batch:
    """What `rank` of `world` computes at `step`.

    A rank without samples gets one whose labels are masked: it takes part in the gradient exchange and adds nothing.
    """
    indices = data.plan.batches[step]
    mine = rank_slice(indices, rank, world)
    idle = len(mine) == 0
    rendered = [_rendered(data, int(i), model, tokenizer) for i in (indices[:1] if idle else mine)]
    if idle:
        rendered[0][0].labels[:] = [IGNORED] * len(rendered[0][0])
    return collate(rendered, data.pad_id, "packed" if data.layout == "packed" else "right")


def label_ids(data: StageData, model: SpeechLLM, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Every token id that the stage's labels use, sorted."""
    used = {t for i in range(len(data.samples)) for t in _rendered(data, i, model, tokenizer)[0].labels if t != IGNORED}
    return torch.tensor(sorted(used))


def _rendered(data: StageData, index: int, model: SpeechLLM, tokenizer: PreTrainedTokenizerBase) -> tuple[Rendered, Audio]:
    sample = data.samples[index]
    audio = data.read(sample.key)
    rendered = model.render(tokenizer, list(sample.messages), audio)
    return rendered, audio if rendered.audio_at else Audio()
