"""The global batch plan: every sample once, within budget, whoever computes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.batching.plan import plan_stage, rank_slice
from models.recipe import Curriculum, Stage

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


def planned(stage: Stage, lengths: list[int], weights: list[float] | None = None, seed: int = 0):  # type: ignore[no-untyped-def]
    sizes = np.array(lengths, dtype=np.int64)
    return plan_stage(stage, sizes, np.array(weights or [1.0] * len(lengths)), sizes.astype(float), seed)


@given(LENGTHS, st.integers(20, 400), st.integers(1, 3), st.integers(0, 5), st.sampled_from(["bucketed", "packed"]))
def test_each_epoch_uses_every_fitting_sample_once(
    lengths: list[int], budget: int, epochs: int, seed: int, layout: str
) -> None:
    stage = Stage(name="s", train=("lora",), epochs=epochs, batch_tokens=budget, max_tokens=250, layout=layout)  # type: ignore[arg-type]
    plan = planned(stage, lengths, seed=seed)
    fits = sorted(i for i, n in enumerate(lengths) if n <= min(250, budget))
    assert sorted(plan.left_out.tolist()) == [i for i in range(len(lengths)) if i not in set(fits)]
    for epoch in range(epochs):
        used = [i for batch, e in zip(plan.batches, plan.epochs, strict=True) if e == epoch for i in batch.tolist()]
        assert sorted(used) == fits


@given(LENGTHS, st.integers(20, 400), st.sampled_from(["bucketed", "packed"]))
def test_no_batch_exceeds_the_budget(lengths: list[int], budget: int, layout: str) -> None:
    plan = planned(Stage(name="s", train=("lora",), batch_tokens=budget, layout=layout), lengths)  # type: ignore[arg-type]
    for batch in plan.batches:
        sizes = [lengths[i] for i in batch]
        assert (max(sizes) * len(sizes) if layout == "bucketed" else sum(sizes)) <= budget


@given(LENGTHS, st.integers(0, 9))
def test_the_same_seed_gives_the_same_plan_and_another_epoch_another_order(lengths: list[int], seed: int) -> None:
    stage = Stage(name="s", train=("lora",), epochs=2, batch_tokens=300)
    one, other = planned(stage, lengths, seed=seed), planned(stage, lengths, seed=seed)
    assert [b.tolist() for b in one.batches] == [b.tolist() for b in other.batches]


@given(LENGTHS, st.integers(1, 4))
def test_ranks_share_a_batch_without_overlap(lengths: list[int], world: int) -> None:
    for batch in planned(Stage(name="s", train=("lora",), batch_tokens=400), lengths).batches:
        parts = [rank_slice(batch, rank, world).tolist() for rank in range(world)]
        assert sorted(i for part in parts for i in part) == sorted(batch.tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_weights_below_one_rotate_and_above_one_repeat() -> None:
    stage = Stage(name="s", train=("lora",), epochs=4, batch_tokens=1000)
    plan = planned(stage, [10] * 40, weights=[0.25] * 20 + [2.0] * 20)
    counts = np.bincount(np.concatenate(plan.batches), minlength=40)
    assert counts[:20].tolist() == [1] * 20
    assert counts[20:].tolist() == [8] * 20


def test_curriculum_brings_short_samples_first_and_reverse_last() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 300).tolist()
    for reverse, sign in ((False, 1), (True, -1)):
        stage = Stage(
            name="s", train=("lora",), batch_tokens=400, curriculum=Curriculum(order="duration", reverse=reverse)
        )
        order = [lengths[i] * sign for batch in planned(stage, lengths).batches for i in batch]
        assert order == sorted(order)


def test_buckets_waste_under_five_percent() -> None:
    lengths = np.random.default_rng(1).integers(15, 60, 2000).tolist()
    plan = planned(Stage(name="s", train=("lora",), batch_tokens=600), lengths)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in plan.batches)
    assert padded / sum(lengths) < 1.05


def test_max_steps_and_fractions_of_an_epoch_stop_early() -> None:
    assert len(planned(Stage(name="s", train=("lora",), batch_tokens=100, max_steps=3), [10] * 500)) == 3
    half = planned(Stage(name="s", train=("lora",), batch_tokens=100, epochs=1.5), [10] * 500)
    assert sum(map(len, half.batches)) == pytest.approx(750)
