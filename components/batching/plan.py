"""The order of a stage, computed before it starts: seed and sample lengths → an ordered list of global batches.

The plan does not know how many workers there are: ranks take slices of a global batch (`rank_slice`), so a run that is
resumed on another number of workers sees the batches that it would have seen. The loader's whole state is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.recipe import Stage

Indices = NDArray[np.int64]
WINDOW = 50  # batches whose samples are sorted by length together: order stays random beyond that


@dataclass(frozen=True)
class Plan:
    """`batches[step]` holds indices into the stage's samples; `left_out` are longer than `max_tokens`."""

    batches: tuple[Indices, ...]
    epochs: tuple[int, ...]
    left_out: Indices

    def __len__(self) -> int:
        return len(self.batches)


def plan_stage(
    stage: Stage, lengths: Indices, weights: NDArray[np.float64], difficulty: NDArray[np.float64], seed: int
) -> Plan:
    """Order the samples of a stage into global batches of at most `stage.batch_tokens` tokens.

    lengths, weights, difficulty: `(samples,)`: tokens; how often a sample comes per epoch (1 = once); what the
    curriculum sorts by. A weight of 0.25 takes each sample in every fourth epoch, 2 takes it twice.
    """
    fits = lengths <= min(stage.max_tokens, stage.batch_tokens)
    batches: list[Indices] = []
    epochs: list[int] = []
    whole = int(np.ceil(stage.epochs))
    for epoch in range(whole):
        rng = np.random.default_rng([seed, epoch])
        drawn = _draw(np.flatnonzero(fits), weights, epoch, rng)
        if epoch == whole - 1 and stage.epochs < whole:
            drawn = drawn[: max(1, round(len(drawn) * (stage.epochs - epoch)))]
        ordered = epoch < stage.curriculum.epochs and stage.curriculum.order != "random"
        if ordered:
            score = -difficulty if stage.curriculum.reverse else difficulty
            drawn = drawn[np.argsort(score[drawn], kind="stable")]
        made = _cut(drawn, lengths, stage, None if ordered else rng)
        batches += made
        epochs += [epoch] * len(made)
        if stage.max_steps is not None and len(batches) >= stage.max_steps:
            break
    return Plan(tuple(batches[: stage.max_steps]), tuple(epochs[: stage.max_steps]), np.flatnonzero(~fits))


def rank_slice(batch: Indices, rank: int, world: int) -> Indices:
    """The part of a global batch that one of `world` ranks computes; may be empty if the batch is small."""
    return batch[rank::world]


def _draw(candidates: Indices, weights: NDArray[np.float64], epoch: int, rng: np.random.Generator) -> Indices:
    """Shuffled candidates, each as often as its weight says; shares below one rotate over the epochs."""
    shuffled = rng.permutation(candidates)
    phase = (candidates * 0.6180339887498949) % 1.0  # golden-ratio phases spread the turns of rare samples evenly
    turns = np.floor((epoch + 1) * weights[candidates] + phase) - np.floor(epoch * weights[candidates] + phase)
    count = np.zeros(len(weights), dtype=np.int64)
    count[candidates] = turns.astype(np.int64)
    return np.repeat(shuffled, count[shuffled])


def _cut(order: Indices, lengths: Indices, stage: Stage, rng: np.random.Generator | None) -> list[Indices]:
    """Cut an order into batches; with `rng` neighbours within a window are sorted by length first."""
    if rng is None:
        return _within_budget(order, lengths, stage)
    per_window = max(1, int(WINDOW * stage.batch_tokens / max(1.0, lengths[order].mean()))) if len(order) else 1
    batches: list[Indices] = []
    for start in range(0, len(order), per_window):
        window = order[start : start + per_window]
        made = _within_budget(window[np.argsort(lengths[window], kind="stable")], lengths, stage)
        batches += [made[i] for i in rng.permutation(len(made))]
    return batches


def _within_budget(order: Indices, lengths: Indices, stage: Stage) -> list[Indices]:
    """Consecutive samples while they fit: by the padded rectangle when bucketed, by the sum when packed."""
    batches, start, total, longest = [], 0, 0, 0
    for i, index in enumerate(order):
        length = int(lengths[index])
        longest = max(longest, length)
        total += length
        size = longest * (i - start + 1) if stage.layout == "bucketed" else total
        if size > stage.batch_tokens and i > start:
            batches.append(order[start:i])
            start, total, longest = i, length, length
    return [*batches, order[start:]] if start < len(order) else batches
