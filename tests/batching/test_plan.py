"""The global batch plan: every sample once, within budget, whoever computes it, and the same from its file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_helpers import lognormal, make_samples, make_stage

from components.batching.plan import Layout, Plan, load_plan, plan_stage, rank_slice, save_plan
from infra import storage
from models.recipe import Curriculum

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "plan_ten_million.py"
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)
LAYOUTS = st.sampled_from(get_args(Layout))
CURRICULA = st.builds(
    Curriculum,
    order=st.sampled_from(["random", "duration", "tokens", "modality"]),
    pacing=st.sampled_from(["sorted", "linear", "root", "step"]),
    reverse=st.booleans(),
    epochs=st.integers(0, 3),
)


def arrays(plan: Plan) -> list[list[int]]:
    return [plan.order.tolist(), plan.starts.tolist(), plan.epochs.tolist(), plan.left_out.tolist()]


@given(LENGTHS, st.integers(20, 400), st.integers(1, 3), st.integers(0, 5), LAYOUTS, CURRICULA)
def test_each_epoch_uses_every_fitting_sample_once_and_no_batch_exceeds_the_budget(
    lengths: list[int], budget: int, epochs: int, seed: int, layout: Any, curriculum: Curriculum
) -> None:
    stage = make_stage(epochs=epochs, batch_tokens=budget, max_tokens=250, curriculum=curriculum)
    plan = plan_stage(stage, make_samples(lengths), seed, layout)
    fits = [i for i, n in enumerate(lengths) if n <= min(250, budget)]
    assert plan.left_out.tolist() == [i for i, n in enumerate(lengths) if n > min(250, budget)]
    batches = [plan.batch(step) for step in range(len(plan))]
    for epoch in range(epochs):
        assert sorted(i for batch, e in zip(batches, plan.epochs, strict=True) if e == epoch for i in batch) == fits
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        assert (max(sizes) * len(sizes) if layout == "bucketed" else sum(sizes)) <= budget


@given(LENGTHS, st.integers(0, 9), LAYOUTS, CURRICULA)
def test_the_same_inputs_give_the_same_plan(lengths: list[int], seed: int, layout: Any, curriculum: Curriculum) -> None:
    stage = make_stage(epochs=2, batch_tokens=300, curriculum=curriculum)
    one, other = (plan_stage(stage, make_samples(lengths), seed, layout) for _ in range(2))
    assert arrays(one) == arrays(other)
    assert [a.dtype for a in (one.order, one.starts, one.epochs, one.left_out)] == ["int32", "int64", "int32", "int32"]


def test_epochs_and_seeds_differ_and_a_longer_run_begins_as_a_shorter_one() -> None:
    samples = make_samples(lognormal(2000, 60))
    one = plan_stage(make_stage(), samples, 0, "packed")
    more = plan_stage(make_stage(epochs=3), samples, 0, "packed")
    assert more.order[:2000].tolist() == one.order.tolist()
    assert more.order[2000:4000].tolist() != one.order.tolist()
    assert plan_stage(make_stage(), samples, 1, "packed").order.tolist() != one.order.tolist()


@given(LENGTHS, st.integers(1, 4))
def test_ranks_share_a_batch_without_overlap(lengths: list[int], world: int) -> None:
    plan = plan_stage(make_stage(batch_tokens=400), make_samples(lengths), 0, "bucketed")
    for step in range(len(plan)):
        parts = [rank_slice(plan.batch(step), rank, world).tolist() for rank in range(world)]
        assert sorted(i for part in parts for i in part) == sorted(plan.batch(step).tolist())
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("layout", get_args(Layout))
def test_weights_below_one_rotate_and_above_one_repeat(layout: Any) -> None:
    samples = make_samples([10] * 40, task=np.repeat([0, 1], 20), tasks=("asr", "label:age"))
    stage = make_stage(epochs=4, batch_tokens=1000, tasks={"asr": 0.25, "labels": 2.0})
    counts = np.bincount(plan_stage(stage, samples, 0, layout).order, minlength=40)
    assert counts[:20].tolist() == [1] * 20
    assert counts[20:].tolist() == [8] * 20


def test_samples_without_labels_are_left_out() -> None:
    samples = make_samples([10, 20, 30, 5000], labels=np.array([1, 0, 3, 4]))
    plan = plan_stage(make_stage(batch_tokens=9000), samples, 0, "packed")
    assert plan.left_out.tolist() == [1, 3]
    assert sorted(plan.order.tolist()) == [0, 2]


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_stage_without_usable_samples_has_no_batch(layout: Any) -> None:
    for lengths in ([], [3000, 4000]):
        plan = plan_stage(make_stage(), make_samples(lengths), 0, layout)
        assert (len(plan), plan.starts.tolist(), len(plan.left_out)) == (0, [0], len(lengths))
    with pytest.raises(IndexError, match="step 0 of a plan of 0 batches"):
        plan.batch(0)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("reverse", [False, True])
def test_curriculum_brings_short_samples_first_or_last_and_only_in_its_epochs(layout: Any, reverse: bool) -> None:
    lengths = lognormal(2000, 60)
    curriculum = Curriculum(order="duration", reverse=reverse)
    stage = make_stage(epochs=2, batch_tokens=600, curriculum=curriculum)
    plan = plan_stage(stage, make_samples(lengths), 0, layout)
    means = np.array([lengths[plan.batch(step)].mean() for step in range(len(plan))])
    first = plan.epochs == 0
    correlation = [
        np.corrcoef(np.argsort(np.argsort(m)), np.arange(len(m)))[0, 1] for m in (means[first], means[~first])
    ]
    assert correlation[0] * (-1 if reverse else 1) > 0.99
    assert abs(correlation[1]) < 0.2


@pytest.mark.parametrize("layout", get_args(Layout))
def test_max_steps_and_fractions_of_an_epoch_stop_early(layout: Any) -> None:
    samples = make_samples([10] * 500)
    short = plan_stage(make_stage(batch_tokens=100, max_steps=3, epochs=1000), samples, 0, layout)
    assert (len(short), short.starts.tolist(), len(short.order)) == (3, [0, 10, 20, 30], 30)
    whole = plan_stage(make_stage(batch_tokens=100), samples, 0, layout)
    assert short.order.tolist() == whole.order[:30].tolist()
    across = plan_stage(make_stage(batch_tokens=100, max_steps=60, epochs=9), samples, 0, layout)
    assert np.bincount(across.epochs).tolist() == [50, 10]
    half = plan_stage(make_stage(batch_tokens=100, epochs=1.5), samples, 0, layout)
    assert np.diff(half.starts).sum() == 750
    assert len(np.unique(half.order)) == 500


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", get_args(Layout))
def test_a_plan_comes_back_from_its_file_and_its_bytes_are_the_same(tmp_path: Path, layout: Any) -> None:
    plan = plan_stage(make_stage(epochs=2), make_samples([*lognormal(999, 60), 5000]), 0, layout)
    path = tmp_path / "deep" / "plan.safetensors"
    save_plan(str(path), plan)
    loaded = load_plan(str(path))
    assert arrays(loaded) == arrays(plan)
    assert loaded.layout == layout
    assert [a.dtype for a in (loaded.order, loaded.starts, loaded.epochs)] == ["int32", "int64", "int32"]
    assert type(loaded.batch(3)) is np.ndarray
    assert not loaded.batch(3).flags.writeable
    save_plan(str(tmp_path / "again"), loaded)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_plan_without_batches_and_a_remote_one_come_back() -> None:
    for lengths in ([], [10] * 50):
        plan = plan_stage(make_stage(), make_samples(lengths), 0, "packed")
        save_plan("memory://plans/p.safetensors", plan)
        assert arrays(load_plan("memory://plans/p.safetensors")) == arrays(plan)
    storage.remove_tree("memory://plans/p.safetensors")


def test_a_damaged_plan_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_plan(str(path), plan_stage(make_stage(), make_samples([10] * 500), 0, "packed"))
    good = path.read_bytes()
    header = int.from_bytes(good[:8], "little")
    fields = json.loads(good[8 : 8 + header])
    for bad in (
        b"",
        good[:4],
        good[:100],
        good[:-40],
        b"\xff" * 200,
        good.replace(b'"packed"', b'"pucked"'),
        good.replace(b'"left_out"', b'"left_aut"'),
        good.replace(b'"I64"', b'"I32"'),
        good[:7] + b"\1" + good[8:],
        (4).to_bytes(8, "little") + b"[12]" + good,
        # One byte more of header: the arrays are whole but lie where no integer of theirs may begin.
        (header + 1).to_bytes(8, "little")
        + json.dumps(fields, separators=(",", ":")).encode().ljust(header + 1)
        + good[8 + header :],
    ):
        path.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"plan.safetensors is no whole plan \(.*remove it and run the stage again"
        ):
            load_plan(str(path))
    with pytest.raises(FileNotFoundError):
        load_plan(str(tmp_path / "none"))


# ---- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", get_args(Layout))
def test_two_hundred_thousand_samples_take_a_second(layout: Any) -> None:
    samples = make_samples(lognormal(200_000, 120), shard=np.repeat(np.arange(200), 1000))
    stage = make_stage(batch_tokens=4096, curriculum=Curriculum(order="duration", pacing="root"))
    began = time.process_time()
    plan = plan_stage(stage, samples, 0, layout)
    assert time.process_time() - began < 3  # 0.2 on an idle machine
    assert np.bincount(plan.order).tolist() == [1] * 200_000


def test_opening_a_plan_reads_its_header_only(tmp_path: Path) -> None:
    plans = [plan_stage(make_stage(), make_samples(lognormal(count, 60)), 0, "packed") for count in (1000, 500_000)]
    taken = []
    for i, plan in enumerate(plans):
        save_plan(str(tmp_path / str(i)), plan)
        times = []
        for _ in range(20):
            began = time.perf_counter()
            loaded = load_plan(str(tmp_path / str(i)))
            loaded.batch(len(loaded) // 2)
            times.append(time.perf_counter() - began)
        taken.append(min(times))
    assert taken[1] < 3 * taken[0] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "pacing"), [("packed", "root"), ("bucketed", "random")])
def test_ten_million_samples_take_less_than_a_minute_and_two_gigabytes(layout: str, pacing: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--case", layout, pacing]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["entries"] == 10_000_000
    assert found["seconds"] < 60
    assert found["peak"] < 2
