"""What planning knows of a stage's samples: one row each, as arrays, so that ten million of them fit in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Samples:
    """The samples of a stage, in the order of the index; every array is `(samples,)`.

    row: which row of the index it comes from (a row gives several samples if several tasks fit it).
    task, collection: positions in `tasks` and `collections`. shard: number of the audio shard.
    tokens: length of the rendered sequence, audio included. labels: how many of them carry loss; 0 = the sample cannot
    be used (CTC without enough positions). seconds: of audio. audio: whether its sequence has audio.
    measures: numeric columns of the index that a curriculum may order by, such as `text_length`.
    label_ids: `(ids,)` sorted, every token id that CTC labels use; empty for other losses.
    """

    row: Ints
    task: Ints
    collection: Ints
    shard: Ints
    tokens: Ints
    labels: Ints
    seconds: Floats
    audio: NDArray[np.bool_]
    tasks: tuple[str, ...]
    collections: tuple[str, ...]
    measures: dict[str, Ints | Floats] = field(default_factory=dict)
    label_ids: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.row)
