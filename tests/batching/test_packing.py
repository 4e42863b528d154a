"""Cutting: within budget, hardly a token unused, and the order as it was."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from plan_helpers import lognormal, rank_correlation, real_lengths

from components.batching.packing import LOOK_AHEAD, bucket, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=500)


def unused(tokens: NDArray[np.int32], budget: int) -> tuple[float, float]:
    """Share of the budget that packing leaves, the last batch aside; rank correlation with the order before."""
    places, starts = pack(tokens, budget)
    sums = np.add.reduceat(tokens[places], starts[:-1])[:-1]
    return 1 - sums.mean() / budget, rank_correlation(places)


def padding(tokens: NDArray[np.int32], budget: int, seed: int | None = 0) -> float:
    """Share of the rectangles that is padding."""
    places, starts = bucket(tokens, budget, None if seed is None else np.random.default_rng(seed))
    longest = np.maximum.reduceat(tokens[places], starts[:-1])
    return float(1 - tokens.sum() / (longest * np.diff(starts)).sum())


@given(LENGTHS, st.integers(60, 500))
def test_packs_hold_each_entry_once_within_the_budget_and_start_with_the_first_left(
    lengths: list[int], budget: int
) -> None:
    tokens = np.array(lengths)
    places, starts = pack(tokens, budget)
    assert sorted(places.tolist()) == list(range(len(tokens)))
    assert (np.diff(starts) > 0).all() and starts[-1] == len(tokens)
    left = deque(range(len(tokens)))
    for start, end in pairwise(starts):
        batch = places[start:end].tolist()
        assert tokens[batch].sum() <= budget
        assert batch[0] == left[0]  # nothing waits for longer than a batch
        assert max(batch) < left[0] + (end - start) + 2 * LOOK_AHEAD
        left = deque(i for i in left if i not in set(batch))
        # None of the next that still fits was left behind.
        near = [i for i in list(left)[:1] if i < min(batch) + LOOK_AHEAD]
        assert all(tokens[i] > budget - tokens[batch].sum() for i in near)


def test_the_gap_is_filled_by_the_longest_that_fits() -> None:
    places, starts = pack(np.array([50, 30, 40, 5, 18, 20, 3]), 100)
    assert places.tolist() == [0, 1, 5, 2, 3, 4, 6]
    assert starts.tolist() == [0, 3, 7]


def test_packing_stops_after_so_many_batches() -> None:
    tokens = lognormal(5000, 60)
    (places, starts), (some, borders) = pack(tokens, 600), pack(tokens, 600, most=7)
    assert borders.tolist() == starts[:8].tolist()
    assert some.tolist() == places[: starts[7]].tolist()


@pytest.mark.parametrize("mean", [60, 120, 180])
@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_packing_leaves_half_a_percent_and_the_order(mean: float, sigma: float) -> None:
    share, correlation = unused(lognormal(50_000, mean, sigma), 4096)
    assert share < 0.005
    assert correlation > 0.9999


def test_packing_real_lengths(shared_data: Path) -> None:
    tokens = real_lengths(shared_data)
    for budget, most in ((600, 0.01), (2048, 0.005), (4096, 0.003)):
        share, correlation = unused(tokens[tokens <= budget], budget)
        assert share < most
        assert correlation > 0.9995


@given(LENGTHS, st.integers(60, 500), st.sampled_from([None, 0, 1]))
def test_buckets_hold_each_entry_once_within_the_rectangle(lengths: list[int], budget: int, seed: int | None) -> None:
    tokens = np.array(lengths)
    places, starts = bucket(tokens, budget, None if seed is None else np.random.default_rng(seed))
    assert sorted(places.tolist()) == list(range(len(tokens)))
    assert (np.diff(starts) > 0).all() and starts[-1] == len(tokens)
    longest = np.maximum.reduceat(tokens[places], starts[:-1])
    assert (longest * np.diff(starts)).max() <= budget


def test_buckets_of_real_lengths_pad_less_than_three_percent(shared_data: Path) -> None:
    tokens = real_lengths(shared_data)
    for budget in (600, 2048, 4096):
        assert padding(tokens[tokens <= budget], budget) < 0.03


def test_buckets_of_a_curriculum_keep_its_order_and_pad_as_little_where_there_is_enough() -> None:
    tokens = lognormal(100_000, 120)
    places, starts = bucket(tokens, 4096, None)
    assert rank_correlation(places) > 0.999
    assert padding(tokens, 4096, None) < 0.035
    means = np.add.reduceat(places, starts[:-1]) / np.diff(starts)
    assert (np.diff(means) >= 0).all()


def test_buckets_come_in_random_order_within_a_window_and_windows_in_order() -> None:
    tokens = lognormal(100_000, 120)
    places, starts = bucket(tokens, 4096, np.random.default_rng(0))
    assert rank_correlation(places) > 0.99
    longest = np.maximum.reduceat(tokens[places], starts[:-1])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.1
