"""Cutting an order into batches within a budget of tokens: one packed row, or rows of nearly equal length.

Both functions are given lengths in order and return places in that order, batch after batch, with the border of each
batch. They loop over plain integers: for so small steps that is faster than a numpy call.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

LOOK_AHEAD = 128  # samples among which the one is sought that fills a packed batch best
AHEAD_SHARE = 32  # of an epoch this part at most, so that the order of a small one holds as well
WINDOW = 50  # batches whose samples are sorted by length together: order stays random beyond that
WINDOW_SHARE = 0.03  # of an epoch with a curriculum at most, so that its order holds

Cut = tuple[NDArray[np.int32], NDArray[np.int64]]  # places (entries,), starts (batches + 1,)


def pack(tokens: NDArray[np.integer], budget: int, most: int | None = None) -> Cut:
    """Batches whose sum of tokens is at most `budget`; at most `most` of them.

    tokens: `(entries,)`, none above the budget. A batch takes entries in order until the next does not fit; the gap is
    filled by the longest fitting ones of the next 128. What was passed over starts the next batch.
    """
    gone = budget + 1  # in place of the length of a used entry: it never fits, so that no test for it is needed
    left = array("i", tokens.astype(np.int32).tobytes())
    places, starts = array("i"), array("q", [0])
    first, end = 0, len(left)
    ahead = min(LOOK_AHEAD, max(8, end // AHEAD_SHARE))
    while first < end and (most is None or len(starts) <= most):
        gap = budget
        while first < end:
            length = left[first]
            if length <= gap:
                gap -= length
                places.append(first)
            elif length != gone:
                break
            first += 1
        if gap and first < end:
            _fill(left, first, ahead, gap, gone, places)
        starts.append(len(places))
    return np.frombuffer(places, dtype=np.int32), np.frombuffer(starts, dtype=np.int64)


def _fill(left: array[int], first: int, ahead: int, gap: int, gone: int, places: array[int]) -> None:
    """Take what fits best from the `ahead` entries from `first` on."""
    window = left[first : first + ahead]
    by_length = sorted(window)
    while found := bisect_right(by_length, gap):
        length = by_length.pop(found - 1)
        offset = window.index(length)
        window[offset] = left[first + offset] = gone
        places.append(first + offset)
        gap -= length


def bucket(tokens: NDArray[np.integer], budget: int, rng: np.random.Generator | None) -> Cut:
    """Batches whose padded rectangle, longest x count, is at most `budget`.

    tokens: `(entries,)`, none above the budget. The entries of a window are sorted by length, and its batches come in
    random order; without `rng` the window is smaller and the batches come by the mean place of their entries.
    """
    count = len(tokens)
    if not count:
        return np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
    tokens = tokens.astype(np.int32)
    size = WINDOW * budget / max(1.0, float(tokens.mean()))
    size = max(1.0, min(size, count if rng else WINDOW_SHARE * count))
    windows = max(1, round(count / size))
    edges = np.arange(windows + 1) * count // windows
    window = np.repeat(np.arange(windows, dtype=np.int32), np.diff(edges))
    # Ascending and descending in turn: a batch may reach over the border of a window, as lengths are equal there.
    places = np.lexsort((np.where(window % 2, -tokens, tokens), window)).astype(np.int32)
    starts = _rectangles(tokens[places], budget)
    sizes = np.diff(starts)
    if rng is None:
        moved = np.argsort(np.add.reduceat(places, starts[:-1], dtype=np.int64) / sizes, kind="stable")
    else:
        moved = np.lexsort((rng.random(len(sizes)), window[starts[:-1]]))
    moved_starts = np.concatenate([[0], np.cumsum(sizes[moved])])
    shift = (starts[:-1][moved] - moved_starts[:-1]).astype(np.int32)
    source = np.arange(count, dtype=np.int32) + np.repeat(shift, sizes[moved])
    return places[source], moved_starts


def _rectangles(tokens: NDArray[np.integer], budget: int) -> NDArray[np.int64]:
    """Borders of the batches when entries are taken in order while the rectangle fits."""
    starts = array("q", [0])
    count = longest = 0
    for place, length in enumerate(memoryview(np.ascontiguousarray(tokens).data)):
        count += 1
        if length > longest:
            longest = length
        if longest * count > budget:
            starts.append(place)
            count, longest = 1, length
    starts.append(len(tokens))
    return np.frombuffer(starts, dtype=np.int64)
