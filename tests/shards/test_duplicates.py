"""Copies are found by their samples and by their sound, in time that grows with their number."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.shards.duplicates import Group, exact_duplicates, fingerprints, linked, near_duplicates


def index(prints: list[np.ndarray | None], digests: list[str | None] | None = None) -> Any:
    """Columns of an index; the keys are k0, k1, ..."""
    count = len(prints)
    return pa.table(
        {
            "key": pa.array([f"k{number}" for number in range(count)], pa.string()),
            "audio_digest": pa.array(digests or [f"d{number}" for number in range(count)], pa.string()),
            "fingerprint": pa.array(prints, pa.list_(pa.uint32())),
        }
    )


def noisy(hashes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The hashes with a share of their bits turned, in bursts as a codec turns them: half of the hashes stay whole."""
    drawn = np.random.default_rng(seed)
    flips = (drawn.random((len(hashes), 32)) < 2 * share) & (drawn.random((len(hashes), 1)) < 0.5)
    return hashes ^ np.packbits(flips, axis=1, bitorder="little").view("<u4").ravel().astype(np.uint32)


def clips(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(1, 2**32, (count, length), dtype=np.uint32))


def test_exact_duplicates_in_order() -> None:
    table = index([None] * 8, ["b", "a", None, "b", "", "a", "b", ""])
    groups = exact_duplicates(table)
    assert groups == [Group((0, 3, 6), ("k0", "k3", "k6"), "b"), Group((1, 5), ("k1", "k5"), "a")]
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2, 3), table.slice(5, 0), table.slice(5)])
    assert exact_duplicates(chunked) == groups
    assert exact_duplicates(index([])) == [] == exact_duplicates(index([None]))


def test_near_duplicates() -> None:
    made = clips(40, 60)
    made[7] = noisy(made[3], 0.08, 1)
    made[20] = noisy(made[3][5:], 0.08, 2)  # cut at its start
    made[31] = np.concatenate([made[30][10:20]] * 1)  # an excerpt: a sixth of the whole
    table = index(made)
    pairs = near_duplicates(table)
    assert [pair.rows for pair in pairs] == [(3, 7), (3, 20)]
    assert [pair.keys for pair in pairs] == [("k3", "k7"), ("k3", "k20")]
    assert all(0.85 < pair.similarity < 0.97 for pair in pairs)
    assert pairs[1].cover == pytest.approx(55 / 60) and pairs[1].overlap == pytest.approx(55 * 0.093)
    assert linked(pairs) == [Group((3, 7, 20), ("k3", "k7", "k20"), "k3")]
    assert [pair.rows for pair in near_duplicates(table, least_cover=0.0)] == [(3, 7), (3, 20), (30, 31)]
    sliced = pa.concat_tables([table.slice(2, 6), table.slice(8, 20)])
    assert [pair.rows for pair in near_duplicates(sliced)] == [(1, 5), (1, 18)]


def test_silence_and_short_clips_match_nothing() -> None:
    short = clips(1, 7)[0]
    sparse = np.zeros(40, np.uint32)
    sparse[::6] = short
    prints = [short, short, np.zeros(40, np.uint32), np.zeros(40, np.uint32), sparse, sparse, None, np.zeros(0), None]
    assert near_duplicates(index(prints)) == []
    assert near_duplicates(index([])) == []


def test_exact_duplicates_are_not_near_ones() -> None:
    made = clips(2, 30)
    table = index([made[0], made[0], noisy(made[0], 0.05, 3)], ["same", "same", "other"])
    assert [pair.rows for pair in near_duplicates(table)] == [(0, 2)]


def test_many_copies_are_linked_without_comparing_all() -> None:
    base = clips(1, 40)[0]
    table = index([*(noisy(base, 0.04, seed) for seed in range(150)), *clips(150, 40, seed=1)])
    pairs = near_duplicates(table)
    assert len(pairs) == 149
    assert linked(pairs)[0].rows == tuple(range(150))
    assert near_duplicates(table) == pairs


def test_fingerprints_of_a_column_with_gaps() -> None:
    column = index([np.array([1, 2]), None, np.array([]), np.array([3])])
    read = fingerprints(pa.concat_tables([column, column.slice(3)]))
    assert [read.of(row).tolist() for row in range(5)] == [[1, 2], [], [], [3], [3]]


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.slow
def test_a_million_digests_take_no_longer_than_a_dictionary_of_them() -> None:
    names = [f"{number:064x}" for number in range(900_000)]
    table = pa.table({"key": [f"k{n}" for n in range(1_000_000)], "audio_digest": names + names[:100_000]})
    before, rows_of = pa.total_allocated_bytes(), defaultdict(list)

    def plainly() -> None:
        for row, name in enumerate(table["audio_digest"].to_pylist()):
            rows_of[name].append(row)

    assert cpu_seconds(lambda: exact_duplicates(table)) < 2 * cpu_seconds(plainly)
    groups = exact_duplicates(table)
    assert [group.rows for group in groups] == [tuple(rows) for rows in rows_of.values() if len(rows) > 1]
    assert pa.total_allocated_bytes() - before < 1 << 29


@pytest.mark.slow
def test_near_duplicates_are_not_looked_for_clip_by_clip() -> None:
    count = 80_000
    made = np.stack(clips(count, 40))
    for copy in range(0, count, 1000):
        made[copy + 500] = noisy(made[copy], 0.06, copy)
    table = index(list(made))
    one_with_all = cpu_seconds(lambda: np.bitwise_count(made ^ made[0]).sum(axis=1))
    assert cpu_seconds(lambda: near_duplicates(table)) < count / 100 * one_with_all
    pairs = near_duplicates(table)
    assert [pair.rows for pair in pairs] == [(copy, copy + 500) for copy in range(0, count, 1000)]
