"""From a plan to batches: picks the samples of a step, reads their features, renders and lays them out, ahead of time.

The whole state of the loader is the step, one integer. Nothing of a batch depends on how many steps were loaded before,
on the number of workers or on how far ahead batches are made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.batching.measure import ReadAudio, Render, measure
from components.batching.plan import Layout, Plan, plan_stage, rank_slice
from components.batching.samples import Ints, Samples
from components.curriculum.examples import Examples
from components.curriculum.tasks import TaskSample
from models.batch import Batch, Pair, collate
from models.contract import SpeechLLM
from models.recipe import Decoding, Stage
from models.rendering import IGNORED

T = TypeVar("T")
AHEAD = 2  # steps whose batches are made while the model computes


@dataclass(frozen=True)
class StageData:
    """The samples of a stage, their plan, and how to read them."""

    stage: Stage
    rows: Sequence[dict[str, Any]]
    samples: Samples
    plan: Plan
    read: ReadAudio
    render: Render
    pad_id: int
    examples: Examples

    def sample(self, number: int) -> TaskSample:
        """The conversation of a sample."""
        task = self.samples.tasks[int(self.samples.task[number])]
        row = self.rows[int(self.samples.row[number])]
        return next(self.examples.samples(row, [task], self.stage.phrasings))

    def keys(self, step: int) -> list[str]:
        """Keys of the clips of a global batch."""
        return [str(self.rows[int(row)]["key"]) for row in self.samples.row[self.plan.batch(step)]]

    def shares(self, step: int) -> dict[str, float]:
        """Share of each task in a global batch."""
        counts = np.bincount(self.samples.task[self.plan.batch(step)], minlength=len(self.samples.tasks))
        named = zip(self.samples.tasks, (counts / counts.sum()).tolist(), strict=True)
        return dict(sorted((task, share) for task, share in named if share))

    def labels(self, step: int) -> int:
        """Tokens of a global batch that carry loss."""
        return int(self.samples.labels[self.plan.batch(step)].sum())


def stage_data(
    stage: Stage,
    rows: Sequence[dict[str, Any]],
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadAudio,
    seed: int,
    layout: Layout = "bucketed",
) -> StageData:
    """Measure and order the samples of a stage. The result may hold no batch if no row has what its tasks need."""
    render, examples = renderer(model, tokenizer), stage_examples(stage, rows, model, read)
    samples = measure(stage, rows, read, render, examples)
    plan = plan_stage(stage, samples, seed, layout)
    return StageData(stage, rows, samples, plan, read, render, pad_id(tokenizer), examples)


def stage_examples(stage: Stage, rows: Sequence[dict[str, Any]], model: SpeechLLM, read: ReadAudio) -> Examples:
    """Where a stage's in-context examples come from: the rows that it trains on.

    Raises ValueError if it wants some of an architecture whose prompts hold a single clip.
    """
    if stage.shots and not model.several_clips and "biased_asr" not in stage.tasks:
        raise ValueError(f"stage {stage.name!r} has shots={stage.shots}, but {model.title} hears one clip a prompt")
    return examples_among(rows, stage, model, read)


def examples_among(
    rows: Sequence[dict[str, Any]], asking: Stage | Decoding, model: SpeechLLM, read: ReadAudio
) -> Examples:
    """The in-context examples that a stage or the decoding asks for, out of these rows."""
    return Examples(rows, asking.shots, feature_vector(read) if asking.nearest else None, model.several_clips)


def feature_vector(read: ReadAudio) -> Callable[[str], Tensor]:
    """The features of a clip by which it is likened to others: those of its first encoder."""

    def vector(key: str) -> Tensor:
        features = read(key).features
        if not features:
            raise ValueError(
                "nearest=true likens cached features, but this stage takes the audio itself: set nearest=false"
            )
        return next(iter(features.values()))

    return vector


def renderer(model: SpeechLLM, tokenizer: PreTrainedTokenizerBase) -> Render:
    """How a sample and its audio become a token sequence."""
    return lambda sample, clips: model.render(tokenizer, list(sample.messages), clips)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows; it carries no loss and nothing attends to it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def global_batch(data: StageData, step: int) -> Ints:
    """The samples of a step, longest first, so that every rank gets lengths alike."""
    batch = data.plan.batch(step)
    return batch[np.argsort(-data.samples.tokens[batch], kind="stable")]


def load_step(
    data: StageData, step: int, rank: int = 0, world: int = 1, micro_tokens: int | None = None, even: bool = False
) -> list[Batch]:
    """The micro-batches that `rank` of `world` computes at `step`, each of at most `micro_tokens` tokens (None: one).

    A rank without samples gets one whose labels are masked: it takes part in the gradient exchange and adds nothing.
    `even` gives every rank as many micro-batches (FSDP exchanges in each of them).
    """
    whole = global_batch(data, step)
    parts = [_micro(data, rank_slice(whole, r, world), micro_tokens) for r in (range(world) if even else [rank])]
    mine = parts[rank if even else 0]
    batches = [batch_of(data, part) for part in mine]
    idle = max(map(len, parts)) - len(mine) if even else 0
    return batches + [batch_of(data, whole[-1:], masked=True) for _ in range(idle or not batches)]


def prefetched(make: Callable[[int], T], steps: range, ahead: int = AHEAD) -> Iterator[tuple[int, T]]:
    """`(step, make(step))` in order, made in a thread while the caller works on earlier ones."""
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        waiting: deque[tuple[int, Future[T]]] = deque()
        try:
            for step in steps:
                waiting.append((step, pool.submit(make, step)))
                if len(waiting) > ahead:
                    at, made = waiting.popleft()
                    yield at, made.result()
            while waiting:
                at, made = waiting.popleft()
                yield at, made.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _micro(data: StageData, mine: Ints, micro_tokens: int | None) -> list[Ints]:
    """Cut samples, longest first, into pieces of at most `micro_tokens` tokens, rows' padding included."""
    if micro_tokens is None or not len(mine):
        return [mine] if len(mine) else []
    pieces: list[list[int]] = [[]]
    used = longest = 0
    for number in mine.tolist():
        length = int(data.samples.tokens[number])
        longest = max(longest, length)
        used += length
        size = used if data.plan.layout == "packed" else longest * (len(pieces[-1]) + 1)
        if size > micro_tokens and pieces[-1]:
            pieces.append([])
            used = longest = length
        pieces[-1].append(number)
    return [np.array(piece) for piece in pieces]


def batch_of(data: StageData, numbers: Ints, layout: Layout | None = None, masked: bool = False) -> Batch:
    """Some samples as one batch, in the plan's layout or another; `masked`: without labels."""
    pairs = [_load(data, int(number)) for number in numbers]
    if masked:
        pairs = [(replace(rendered, labels=[IGNORED] * len(rendered)), clips) for rendered, clips in pairs]
    return collate(pairs, data.pad_id, "packed" if (layout or data.plan.layout) == "packed" else "right")


def _load(data: StageData, number: int) -> Pair:
    sample = data.sample(number)
    clips = [data.read(key) for key in sample.keys]
    return data.render(sample, clips), clips
