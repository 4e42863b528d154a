"""Other clips that a prompt shows as examples, or whose words it mixes in: drawn by key, or nearest by sound.

Drawn: of the same data set, the same ones in every process and on every resume. Nearest: by the cosine of features
averaged over time, as Audio Flamingo retrieves its in-context samples (arXiv 2402.01831, section 3.2).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from components.curriculum.tasks import TaskSample, samples_of

Row = dict[str, Any]
TRIES = 64  # rows that are looked at before a prompt goes with fewer examples


class Examples:
    """Chooses `count` rows of `pool` for a row; `vector` gives a clip's features `(frames, width)` for the nearest.

    `turns`: whether they may be turns of a conversation; else they only lend their words to `biased_asr`.
    """

    def __init__(
        self,
        pool: Sequence[Row] = (),
        count: int = 0,
        vector: Callable[[str], Tensor] | None = None,
        turns: bool = True,
    ) -> None:
        self.pool, self.count, self.vector, self.turns = pool, count, vector, turns

    def of(self, row: Row, task: str) -> list[Row]:
        """Rows that `task` can be asked of, never the row itself; fewer than `count` if there are not more."""
        if not self.count or not (self.turns or task == "biased_asr"):
            return []
        order = self._nearest(row) if self.vector else self._drawn(row)
        found: list[Row] = []
        for number in order[:TRIES]:
            other = self.pool[number]
            if other["key"] != row["key"] and samples_of(other, task):
                found.append(other)
            if len(found) == self.count:
                break
        return found

    def samples(self, row: Row, tasks: Iterable[str], phrasings: int = 1) -> Iterator[TaskSample]:
        """What a row gives for each task, behind the examples that were chosen for it."""
        for task in tasks:
            for made in samples_of(row, task, phrasings):
                others = self.of(row, made.task)
                yield samples_of(row, made.task, phrasings, others)[0] if others else made

    def _drawn(self, row: Row) -> list[int]:
        """Places in the pool, all different: from a place that the key gives, by a step that reaches every member."""
        members = self._by_collection.get(collection(row)) or range(len(self.pool))
        size = len(members)
        if not size:
            return []
        drawn = int.from_bytes(hashlib.sha256(row["key"].encode()).digest()[:8], "big")
        start, first = drawn % size, 1 + drawn // size % size
        step = next(step for step in range(first, size + 2) if math.gcd(step, size) == 1)
        return [members[(start + i * step) % size] for i in range(min(TRIES, size))]

    def _nearest(self, row: Row) -> list[int]:
        assert self.vector is not None
        likeness = self._vectors @ _mean(self.vector(row["key"]))
        return likeness.topk(min(TRIES, len(likeness))).indices.tolist()  # type: ignore[no-any-return]

    @cached_property
    def _by_collection(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self.pool):
            found.setdefault(collection(row), []).append(number)
        return found

    @cached_property
    def _vectors(self) -> Tensor:
        assert self.vector is not None
        return torch.stack([_mean(self.vector(row["key"])) for row in self.pool])


NONE = Examples()


def collection(row: Row) -> str:
    """The data set that a row belongs to: the first folder of its recording's path."""
    first, slash, _ = str(row.get("original", "")).partition("/")
    return first if slash else ""


def _mean(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float().mean(0), dim=0)
