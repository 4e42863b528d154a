"""The order of an epoch: shards together, easy samples first, and each entry exactly once."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_helpers import make_samples, make_stage

from components.batching.order import INCREMENTS, base_order, competence, curriculum_order, difficulty
from models.recipe import Curriculum

PACINGS = ("sorted", "linear", "root", "step")


@given(st.lists(st.integers(3, 40), min_size=1, max_size=300), st.integers(1, 50), st.integers(0, 5))
def test_at_most_so_many_shards_are_open_and_nothing_is_lost(shards: list[int], mixing: int, seed: int) -> None:
    shard = np.array(shards)
    drawn = np.arange(len(shards), dtype=np.int32)
    order = base_order(drawn, shard, mixing, np.random.default_rng(seed))
    assert sorted(order.tolist()) == drawn.tolist()
    read = shard[order]
    places = [np.flatnonzero(read == each) for each in np.unique(shard)]
    first, last = np.array([p[0] for p in places]), np.array([p[-1] for p in places])
    assert max(int(((first <= place) & (place <= last)).sum()) for place in range(len(read))) <= mixing


def test_few_shards_are_shuffled_as_one_and_shards_come_in_another_order_each_epoch() -> None:
    shard = np.repeat(np.arange(16), 100)
    drawn = np.arange(1600, dtype=np.int32)
    order = base_order(drawn, shard, 16, np.random.default_rng([0, 0]))
    assert abs(np.corrcoef(order, np.arange(1600))[0, 1]) < 0.1
    assert len(np.unique(shard[order[:100]])) == 16
    grouped = [base_order(drawn, shard, 4, np.random.default_rng([0, epoch])) for epoch in range(2)]
    assert [len(np.unique(shard[grouped[0][i : i + 400]])) for i in range(0, 1600, 400)] == [4, 4, 4, 4]
    assert set(shard[grouped[0][:400]]) != set(shard[grouped[1][:400]])


def scored(order: str, reverse: bool = False, **given: Any) -> list[float]:
    samples = make_samples(
        [30, 10, 20],
        seconds=np.array([2.0, 0.0, 1.0], dtype=np.float32),
        audio=np.array([True, False, True]),
        task=np.array([1, 0, 2], dtype=np.int8),
        tasks=("label:age", "asr", "tts"),
        measures={"text_length": np.array([8, 5, 9]), "snr": np.array([3.0, 1.0, 2.0])},
    )
    curriculum = Curriculum(order=order, reverse=reverse)
    stage = make_stage(name="align", tasks={"asr": 1, "labels": 1}, curriculum=curriculum)
    return difficulty(stage, samples).tolist()  # type: ignore[no-any-return]


def test_difficulty_is_what_its_name_says() -> None:
    assert scored("duration") == [2, 0, 1]
    assert scored("text") == [8, 5, 9]
    assert scored("tokens") == [30, 10, 20]
    assert scored("tokens", reverse=True) == [-30, -10, -20]
    assert scored("rate") == [4, 0, 9]
    assert scored("tasks") == [0, 1, 2]  # asr before labels as the recipe has them; what it does not name is last
    assert scored("modality") == [1, 0, 1]
    assert scored("snr") == [3, 1, 2]


def test_an_unknown_order_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"stage align: no curriculum order 'durations'.*mean 'duration'.*rate, text_l"
    ):
        scored("durations")
    stage = make_stage(curriculum=Curriculum(order="text"))
    with pytest.raises(ValueError, match=r"no curriculum order 'text'. There are: random, duration, tokens"):
        difficulty(stage, make_samples([10]))


def test_competence_follows_the_published_formulae() -> None:
    linear, root = (Curriculum(pacing=pacing, start=0.2) for pacing in ("linear", "root"))
    assert competence(linear, 0.5) == pytest.approx(0.6)
    assert competence(root, 0.5) == pytest.approx(math.sqrt(0.04 + 0.96 * 0.5))
    step = Curriculum(pacing="step", start=0.5, levels=5)
    assert [competence(step, t) for t in (0, 0.19, 0.2, 0.4, 0.6, 0.8, 1)] == [0.5, 0.5, 0.5, 0.6, 0.8, 1, 1]


@given(st.sampled_from(PACINGS), st.floats(0.001, 1), st.integers(1, 200), st.floats(0, 1))
def test_competence_never_runs_dry_and_ends_at_all(pacing: Any, start: float, levels: int, t: float) -> None:
    curriculum = Curriculum(pacing=pacing, start=start, levels=levels)
    assert t <= competence(curriculum, t) <= 1
    assert competence(curriculum, 1) == 1
    assert competence(curriculum, t) >= competence(curriculum, t / 2)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=400),
    st.sampled_from(PACINGS),
    st.floats(0.01, 1),
    st.integers(1, 90),
)
def test_each_entry_comes_once_and_not_before_it_is_available(
    scores: list[int], pacing: Any, start: float, levels: int
) -> None:
    curriculum = Curriculum(order="tokens", pacing=pacing, start=start, levels=levels)
    count, values = len(scores), np.array(scores, dtype=float)
    base = np.random.default_rng(0).permutation(count).astype(np.int32)
    order = curriculum_order(curriculum, base, values)
    assert sorted(order.tolist()) == list(range(count))
    rank = np.empty(count, dtype=int)
    rank[base[np.argsort(values[base], kind="stable")]] = np.arange(count)  # ties in base order
    if pacing == "sorted":
        assert rank[order].tolist() == list(range(count))
        return
    for place, index in enumerate(order):
        # An entry spans the share up to the next; a pool that is used up gets what its increment still needs.
        share = (place + 1) / count
        available = max(competence(curriculum, share), share + 1 / INCREMENTS)
        assert rank[index] < math.ceil(count * available + 1e-6)


def test_step_pacing_opens_exact_levels() -> None:
    scores = np.random.default_rng(0).permutation(1000).astype(float)
    order = curriculum_order(Curriculum(order="tokens", pacing="step"), np.arange(1000, dtype=np.int32), scores)
    levels = scores[order].reshape(5, 200)
    assert [(level.min(), level.max()) for level in levels] == [(200 * i, 200 * i + 199) for i in range(5)]
    assert (np.diff(order.reshape(5, 200), axis=1) > 0).all()  # within a level in the order that was there before


def one_by_one(curriculum: Curriculum, scores: np.ndarray) -> list[int]:
    """Paced order as its definition says: at each place the first entry of those that are available."""
    easiest, count = np.argsort(scores, kind="stable").tolist(), len(scores)
    pool: list[int] = []
    order: list[int] = []
    known = 0
    for place in range(count):
        open_to = max(math.floor(count * competence(curriculum, place / count)), place + 1)
        while known < open_to:
            heapq.heappush(pool, easiest[known])
            known += 1
        order.append(heapq.heappop(pool))
    return order


@pytest.mark.parametrize("pacing", ["linear", "root"])
def test_increments_come_close_to_the_order_taken_one_by_one(pacing: Any) -> None:
    count = 10_000
    scores = np.random.default_rng(0).permutation(count).astype(float)
    curriculum = Curriculum(order="tokens", pacing=pacing)
    order = curriculum_order(curriculum, np.arange(count, dtype=np.int32), scores)
    exact = one_by_one(curriculum, scores)
    means, exact_means = (scores[found].reshape(20, -1).mean(axis=1) for found in (order, exact))
    assert np.abs(means - exact_means)[:16].max() < 0.03 * count
    # At the end the pool is smaller than an increment: easy entries that are still waiting go a little earlier.
    assert np.abs(means - exact_means)[16:].max() < 0.07 * count
    assert scores[order[: count // INCREMENTS]].max() < 0.1 * count
    assert np.corrcoef(scores[order], np.arange(count))[0, 1] > 0.55
