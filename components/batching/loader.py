"""From a plan to batches: reads features, renders conversations, lays rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
    rendered: tuple[Rendered, ...]
    seconds: np.ndarray
    plan: Plan
    read: ReadAudio
    pad_id: int
    layout: str

    def shares(self, step: int) -> dict[str, float]:
        """Share of each task in a global batch."""
        tasks = [self.samples[i].task for i in self.plan.batches[step]]
        return {task: tasks.count(task) / len(tasks) for task in sorted(set(tasks))}


def stage_data(
    stage: Stage, rows: Sequence[dict], model: SpeechLLM, tokenizer: PreTrainedTokenizerBase, read: ReadAudio, seed: int
) -> StageData:
    """Select, measure and order the samples of a stage. The result may hold no batch if no row has the fields."""
    samples = select(rows, stage.tasks)
    seconds_of = {row["key"]: row["seconds"] for row in rows}
    rendered = [model.render(tokenizer, list(s.messages), read(s.key)) for s in samples]
    lengths = np.array(
        [len(r) if stage.loss == "lm" or alignable(r) else stage.max_tokens + 1 for r in rendered], dtype=np.int64
    )
    weights = np.array([stage.tasks.get(s.task, stage.tasks.get(generic_name(s.task), 0.0)) for s in samples])
    seconds = np.array([seconds_of[s.key] for s in samples])
    difficulty = (
        seconds if stage.curriculum.order == "duration" else np.array([float(len(s.reference)) for s in samples])
    )
    plan = plan_stage(stage, lengths, weights, difficulty, seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return StageData(tuple(samples), tuple(rendered), seconds, plan, read, int(pad), stage.layout)


def alignable(rendered: Rendered) -> bool:
    """Whether CTC has a position for each label and one more between equal ones; samples without are left out."""
    labels = [label for label in rendered.labels if label != IGNORED][:-1]  # the end token is the blank
    return len(labels) + sum(one == other for one, other in pairwise(labels)) <= len(rendered.audio_at)


def load_batch(data: StageData, step: int, rank: int, world: int) -> Batch:
    """What `rank` of `world` computes at `step`.

    A rank without samples gets one whose labels are masked: it takes part in the gradient exchange and adds nothing.
    """
    indices = data.plan.batches[step]
    mine = rank_slice(indices, rank, world)
    pairs = [_with_audio(data, int(i)) for i in (mine if len(mine) else indices[:1])]
    if not len(mine):
        pairs = [(replace(rendered, labels=[IGNORED] * len(rendered)), audio) for rendered, audio in pairs]
    return collate(pairs, data.pad_id, "packed" if data.layout == "packed" else "right")


def label_ids(data: StageData) -> torch.Tensor:
    """Every token id that the stage's labels use, sorted."""
    return torch.tensor(sorted({label for rendered in data.rendered for label in rendered.labels if label != IGNORED}))


def _with_audio(data: StageData, index: int) -> tuple[Rendered, Audio]:
    rendered = data.rendered[index]
    return rendered, data.read(data.samples[index].key) if rendered.audio_at else Audio()
