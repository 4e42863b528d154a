"""How often samples come: once where nothing is said, by weight and temperature where something is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_helpers import make_samples, make_stage

from components.batching.mixture import draw, sample_weights, task_weight, tempered, turns


def test_a_task_is_weighed_by_its_own_name_before_its_generic_one() -> None:
    tasks = {"labels": 0.5, "label:emotion": 2.0, "translation": 3.0, "asr": 1.0}
    found = [task_weight(tasks, name) for name in ("label:emotion", "label:age", "translate:de", "asr", "tts")]
    assert found == [2.0, 0.5, 3.0, 1.0, 0.0]


def test_weights_multiply_and_unusable_samples_have_none() -> None:
    samples = make_samples(
        [10] * 6,
        task=np.array([0, 0, 1, 1, 0, 1]),
        collection=np.array([0, 1, 0, 1, 0, 1]),
        tasks=("asr", "label:age"),
        collections=("books", "calls"),
    )
    stage = make_stage(tasks={"asr": 1.0, "labels": 0.5}, datasets={"calls": 3.0})
    usable = np.array([True, True, True, True, False, True])
    assert sample_weights(stage, samples, usable).tolist() == [1.0, 3.0, 0.5, 1.5, 0.0, 1.5]


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_weight_that_is_no_count_is_refused_by_name(weight: float) -> None:
    for weights in ({"tasks": {"asr": weight}}, {"datasets": {"books": weight}}):
        with pytest.raises(ValueError, match=r"stage s: (asr|books) has the weight"):
            sample_weights(make_stage(**weights), make_samples([10]), np.array([True]))


def test_temperature_takes_shares_as_a_root_of_size_and_keeps_the_epoch() -> None:
    collection = np.repeat([0, 1, 2], [1600, 400, 100])
    samples = make_samples([10] * 2100, collection=collection, collections=("a", "b", "c"))
    weights = sample_weights(make_stage(temperature=2.0), samples, np.ones(2100, dtype=bool))
    shares = np.bincount(collection, weights=weights)
    assert shares / shares[2] == pytest.approx([4, 2, 1], rel=1e-6)  # roots of 1600, 400, 100
    assert weights.sum() == pytest.approx(2100, rel=1e-6)
    # The size that counts is what the other weights leave: here 400 of each.
    stage = make_stage(temperature=2.0, datasets={"a": 0.25, "c": 4.0})
    even = np.bincount(collection, weights=sample_weights(stage, samples, np.ones(2100, dtype=bool)))
    assert even == pytest.approx([400, 400, 400], rel=1e-6)


@given(st.lists(st.floats(0, 1e8), min_size=1, max_size=8), st.floats(0.2, 20))
def test_tempering_keeps_the_sum_and_the_order_of_sizes(sizes: list[float], temperature: float) -> None:
    found = np.array(sizes)
    made = found * tempered(found, temperature)
    assert made.sum() == pytest.approx(found.sum(), rel=1e-6)
    assert (np.diff(made[np.argsort(found)]) >= -1e-6 * found.max()).all()


def test_a_temperature_over_one_data_set_changes_nothing() -> None:
    samples = make_samples([10] * 4999)
    weights = sample_weights(make_stage(temperature=3.7), samples, np.ones(4999, dtype=bool))
    assert all(turns(weights, epoch).tolist() == [1] * 4999 for epoch in range(30))


@given(st.floats(0, 5), st.integers(1, 300), st.integers(1, 12))
def test_turns_add_up_to_the_weight(weight: float, count: int, epochs: int) -> None:
    weights = np.full(count, weight)
    total = sum(turns(weights, epoch) for epoch in range(epochs))
    assert np.abs(total - epochs * weight).max() <= 1 + 1e-9


def test_rare_samples_are_spread_evenly_over_the_epochs() -> None:
    sizes = [len(draw(np.full(10_000, 0.1), epoch)) for epoch in range(10)]
    assert sum(sizes) == 10_000
    assert max(sizes) - min(sizes) <= 10


def test_a_sample_that_comes_twice_stands_twice() -> None:
    assert draw(np.array([1.0, 2.0, 0.0, 3.0]), 0).tolist() == [0, 1, 1, 3, 3, 3]
