"""The summary of a plan counts what is there, and its page shows it."""

from __future__ import annotations

import re
import time
from typing import Any, get_args

import numpy as np
import pytest
from plan_helpers import lognormal, make_samples, make_stage

from components.batching.plan import Layout, Plan, plan_stage
from components.batching.preview import plan_page, spearman, summarise
from components.batching.samples import Samples
from models.recipe import Curriculum


def mixed(count: int, collections: int = 2) -> Samples:
    rng = np.random.default_rng(0)
    return make_samples(
        lognormal(count, 60),
        task=rng.integers(0, 2, count),
        collection=np.arange(count) % collections,
        tasks=("asr", "label:<age>"),
        collections=tuple(f"set-{i}" for i in range(collections)),
    )


def by_hand(layout: Any) -> Plan:
    order, starts = np.array([0, 1, 2, 3, 4], dtype=np.int32), np.array([0, 2, 4, 5], dtype=np.int64)
    return Plan(order, starts, np.zeros(3, dtype=np.int32), np.array([5], dtype=np.int32), layout)


def test_a_summary_counts_what_the_plan_holds() -> None:
    samples = make_samples([10, 8, 6, 6, 4, 99], task=np.array([0, 1, 0, 1, 0, 0]), tasks=("asr", "tts"))
    stage = make_stage(batch_tokens=20, max_tokens=50)
    found = summarise(by_hand("bucketed"), samples, stage)
    assert (found.steps, found.epochs, found.samples, found.left_out, found.tokens) == (3, 1, 5, 1, 34)
    assert found.padding == pytest.approx(1 - 34 / (20 + 12 + 4))
    assert found.batch_samples == (1, 2, 2)
    assert found.batch_tokens == (4, 12, 18)
    assert found.tasks == pytest.approx({"asr": 0.6, "tts": 0.4})
    assert found.collections == {"books": 1.0}
    assert found.order_kept is None
    packed = summarise(by_hand("packed"), samples, stage)
    assert packed.padding == pytest.approx(1 - (18 + 12) / 40)  # the last batch has no chance to be full


def test_rank_correlation_shares_ranks_among_ties() -> None:
    assert spearman(np.arange(4), np.array([1, 5, 7, 9])) == pytest.approx(1)
    assert spearman(np.arange(4), np.array([9, 7, 5, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 3, 4]), np.array([1, 1, 2, 2])) == pytest.approx(0.8944, abs=1e-4)
    assert spearman(np.arange(4), np.ones(4)) is None


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_sorted_curriculum_keeps_its_order_and_a_random_epoch_after_it_does_not_count(layout: Any) -> None:
    samples = mixed(20_000)
    stage = make_stage(epochs=2, batch_tokens=2048, curriculum=Curriculum(order="duration"))
    found = summarise(plan_stage(stage, samples, 0, layout), samples, stage)
    assert found.order_kept is not None and found.order_kept > 0.999
    assert found.epochs == 2


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_page_is_whole_escaped_and_loads_nothing(layout: Any) -> None:
    samples = mixed(3000, collections=12)
    curriculum = Curriculum(order="tokens", pacing="root")
    stage = make_stage(name="a<b", tasks={"asr": 1, "labels": 1}, epochs=2, curriculum=curriculum)
    plan = plan_stage(stage, samples, 0, layout)
    html = plan_page("demo <1>", stage, plan, samples)
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert "demo &lt;1&gt;" in html and "a&lt;b" in html and "label:&lt;age&gt;" in html
    assert "<age>" not in html and "<script" not in html and not re.search(r'(src|href)="http', html)
    assert html.count("<svg") == 7  # tasks, data sets, difficulty, seconds, tokens, samples, pacing
    assert "others" in html  # there are twelve data sets and eight colours
    assert "epoch 2" in html
    assert "tokens, root" in html
    assert html.count("<figure>") == 7


def test_a_random_order_has_no_pacing_and_an_empty_plan_says_so() -> None:
    samples = mixed(500)
    stage = make_stage(tasks={"asr": 1, "labels": 1})
    html = plan_page("demo", stage, plan_stage(stage, samples, 0, "packed"), samples)
    assert "Pacing" not in html and html.count("<svg") == 5
    nothing = make_samples([9000])
    empty = plan_stage(stage, nothing, 0, "packed")
    assert "No sample of this stage can be used" in plan_page("demo", stage, empty, nothing)
    assert summarise(empty, nothing, stage).left_out == 1


def test_a_measure_with_gaps_is_drawn_and_ranked_without_them() -> None:
    count = 2000
    snr = np.where(np.arange(count) % 3, np.arange(count), np.nan)
    samples = make_samples(lognormal(count, 60), measures={"snr": snr})
    stage = make_stage(batch_tokens=600, curriculum=Curriculum(order="snr"))
    plan = plan_stage(stage, samples, 0, "packed")
    found = summarise(plan, samples, stage)
    assert found.order_kept is not None and found.order_kept > 0.999
    assert "nan" not in plan_page("demo", stage, plan, samples).partition("<body>")[2]


def test_a_page_of_many_batches_stays_small_and_quick() -> None:
    samples = make_samples(np.full(200_000, 10))
    stage = make_stage(batch_tokens=10)
    plan = plan_stage(stage, samples, 0, "packed")
    assert len(plan) == 200_000
    began = time.process_time()
    html = plan_page("demo", stage, plan, samples)
    assert time.process_time() - began < 3  # 0.1 on an idle machine
    assert len(html) < 400_000
