"""The same learning however it is computed: workers, micro-batches, layouts, DDP, FSDP, recomputing and compiling."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_helpers import StopAt, apart, built, curve, final, make_loop, make_stage, stopped, trained

from components.batching.loader import load_step
from components.batching.plan import Layout
from components.training.history import read_metrics
from components.training.loop import train_stage
from components.training.precision import store_frozen
from infra.processes import free_port
from models.recipe import Optimiser, Stage

Loss = Literal["lm", "ctc"]
CASES: list[tuple[Loss, Layout]] = [("lm", "bucketed"), ("lm", "packed"), ("ctc", "bucketed"), ("ctc", "packed")]
STOP = 4  # the step after which a run is stopped that goes on elsewhere; its checkpoint is of step 4


def stage_of(loss: Loss) -> Stage:
    """Clipping acts at every step, so that a wrong norm would be seen in the weights."""
    return make_stage(loss, optimiser=Optimiser(lr=2e-3 if loss == "lm" else 2e-4, warmup=2, clip=0.05))


@dataclass(frozen=True)
class Job:
    """One run of some workers, in a folder of its own.

    stop: after which step it ends unfinished. half: frozen matrices are kept in bfloat16.
    """

    name: str
    loss: Loss = "lm"
    layout: Layout = "packed"
    stop: int | None = None
    bad_clip: bool = False
    half: bool = False
    compute: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: str, rank: int, world: int) -> None:
        parts = built()
        if self.bad_clip:
            parts.audios["c3"].features["speech"][0, 0] = float("nan")
        if self.half:
            parts.model.freeze(stage_of(self.loss).train)
            store_frozen(parts.model, torch.bfloat16, set())
        given = {"layout": self.layout, "scheduler": StopAt(self.stop, rank, world)} | self.compute
        url = Path(folder, self.name)
        if self.stop is None:
            train_stage(make_loop(url, stage_of(self.loss), parts, **given), [])
        else:
            stopped(self.stop, url, stage_of(self.loss), parts, **given)


def _worker(rank: int, world: int, port: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for job in jobs:
        job.run(folder, rank, world)
        dist.barrier()
    dist.destroy_process_group()


def run_on(world: int, folder: Path, jobs: list[Job]) -> None:
    """Run jobs one after the other on `world` processes."""
    port = free_port()
    mp.spawn(_worker, (world, port, str(folder), jobs), nprocs=world)  # type: ignore[no-untyped-call]


def assert_same_learning(left: Path, right: Path, weights: float = 1e-5) -> None:
    """Loss, norm of the gradient and batches at every step, and the weights at the end."""
    for exact in ("tokens", "labels", "lr", "tasks", "epoch"):
        assert curve(left, exact) == curve(right, exact)
    assert curve(left) == pytest.approx(curve(right), rel=1e-5)
    ctc = curve(left, "stage")[0] == "align"  # float32 CTC: e to the power of a difference of losses of thousands
    assert curve(left, "gradient_norm") == pytest.approx(curve(right, "gradient_norm"), rel=1e-3 if ctc else 1e-4)
    assert apart(final(left), final(right)) < weights


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case by one process, a global batch at a time."""
    folder = tmp_path_factory.mktemp("alone")
    for loss, layout in CASES:
        Job(f"{loss}-{layout}", loss, layout).run(str(folder), 0, 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["lm", "ctc"])
def test_packed_bucketed_and_one_sample_at_a_time_learn_the_same(tmp_path: Path, loss: Loss) -> None:
    forms: dict[str, tuple[Layout, int]] = {"bucketed": ("bucketed", 0), "packed": ("packed", 0), "ones": ("packed", 1)}
    for name, (layout, micro_tokens) in forms.items():
        loop = make_loop(tmp_path / name, stage_of(loss), layout="bucketed", micro_tokens=micro_tokens)
        loop.data = replace(loop.data, plan=replace(loop.data.plan, layout=layout))  # the same global batches
        train_stage(loop, [])
    assert len(load_step(loop.data, 1, micro_tokens=1)) == len(loop.data.plan.batch(1)) > 4
    assert_same_learning(tmp_path / "bucketed", tmp_path / "packed")
    assert_same_learning(tmp_path / "bucketed", tmp_path / "ones")


@pytest.mark.parametrize(("loss", "layout"), CASES)
def test_micro_batches_learn_what_the_whole_batch_learns(alone: Path, tmp_path: Path, loss: Loss, layout: Any) -> None:
    trained(tmp_path, stage_of(loss), layout=layout, micro_tokens=130)
    assert_same_learning(alone / f"{loss}-{layout}", tmp_path)
    data = make_loop(tmp_path, stage_of(loss), layout=layout).data
    assert max(len(load_step(data, step, micro_tokens=130)) for step in range(len(data.plan))) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_recomputed_activations_give_the_same_bits(alone: Path, tmp_path: Path, layout: Any) -> None:
    trained(tmp_path, stage_of("lm"), layout=layout, activation_checkpointing=True)
    assert curve(tmp_path) == curve(alone / f"lm-{layout}")
    assert apart(final(tmp_path), final(alone / f"lm-{layout}")) == 0.0


@pytest.mark.slow
def test_recomputed_activations_draw_the_same_dropout(tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        trained(tmp_path / name, parts=built(dropout=0.3), layout="packed", activation_checkpointing=recompute)
    assert apart(final(tmp_path / "kept"), final(tmp_path / "recomputed")) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_compiled_layers_learn_the_same(tmp_path: Path, layout: Any) -> None:
    stage = stage_of("lm").model_copy(update={"max_steps": 5})
    trained(tmp_path / "plain", stage, built(layers=1), layout=layout)
    trained(tmp_path / "compiled", stage, built(layers=1), layout=layout, compile=True)
    assert_same_learning(tmp_path / "plain", tmp_path / "compiled", weights=1e-4)


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers do: every case on DDP and FSDP2, and halves of runs that others begin or finish."""
    folder = tmp_path_factory.mktemp("two")
    fsdp = {"parallel": "fsdp"}
    Job("1-to-2", stop=STOP).run(str(folder), 0, 1)
    Job("1-to-fsdp", stop=STOP).run(str(folder), 0, 1)
    jobs = [Job(f"ddp-{loss}-{layout}", loss, layout, compute={"micro_tokens": 130}) for loss, layout in CASES]
    jobs += [Job(f"fsdp-{loss}-{layout}", loss, layout, compute=fsdp) for loss, layout in CASES]
    jobs += [Job("fsdp-micro", compute=fsdp | {"micro_tokens": 130})]
    jobs += [Job("1-to-2"), Job("1-to-fsdp", compute=fsdp)]
    jobs += [Job("2-to-1", stop=STOP), Job("fsdp-to-1", stop=STOP, compute=fsdp)]
    jobs += [Job("ddp-to-fsdp", stop=STOP), Job("ddp-to-fsdp", compute=fsdp)]
    jobs += [Job("fsdp-to-ddp", stop=STOP, compute=fsdp), Job("fsdp-to-ddp")]
    jobs += [Job("bad", bad_clip=True), Job("fsdp-bad", bad_clip=True, compute=fsdp)]
    jobs += [Job("half", half=True, compute=fsdp | {"precision": "bfloat16"})]
    jobs += [Job("recomputed", compute=fsdp | {"activation_checkpointing": True})]
    run_on(2, folder, jobs)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    jobs = [Job(f"ddp-{loss}-{layout}", loss, layout) for loss, layout in CASES]
    run_on(4, folder, [*jobs, Job("fsdp-lm-packed", compute={"parallel": "fsdp"})])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "layout"), CASES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_learn_what_one_learns(alone: Path, two: Path, loss: Loss, layout: Any, parallel: str) -> None:
    assert_same_learning(alone / f"{loss}-{layout}", two / f"{parallel}-{loss}-{layout}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp-lm-bucketed", "ddp-lm-packed", "ddp-ctc-bucketed", "ddp-ctc-packed"])
def test_four_workers_learn_what_one_learns(alone: Path, four: Path, name: str) -> None:
    assert_same_learning(alone / name.partition("-")[2], four / name)


@pytest.mark.slow
def test_four_shards_learn_what_one_worker_learns(alone: Path, four: Path) -> None:
    assert_same_learning(alone / "lm-packed", four / "fsdp-lm-packed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-micro", "recomputed", "1-to-2", "1-to-fsdp", "ddp-to-fsdp", "fsdp-to-ddp"])
def test_shards_in_pieces_and_runs_that_move_learn_the_same(alone: Path, two: Path, name: str) -> None:
    assert_same_learning(alone / "lm-packed", two / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2-to-1", "fsdp-to-1"])
def test_what_two_workers_began_one_ends(alone: Path, two: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(two / name, tmp_path / name)
    state = json.loads((tmp_path / name / "checkpoints" / "step-0000004" / "state.json").read_text())
    assert (state["world"], state["step"]) == (2, 4)
    Job(name).run(str(tmp_path), 0, 1)
    assert_same_learning(alone / "lm-packed", tmp_path / name)


@pytest.mark.slow
def test_all_workers_leave_out_the_batch_that_one_of_them_cannot_compute(two: Path, tmp_path: Path) -> None:
    Job("bad", bad_clip=True).run(str(tmp_path), 0, 1)
    for name in ("bad", "fsdp-bad"):
        lost = [line["step"] for line in read_metrics(str(two / name)) if line["loss"] is None]
        assert lost == [line["step"] for line in read_metrics(str(tmp_path / "bad")) if line["loss"] is None]
        assert len(lost) == 3
        assert apart(final(two / name), final(tmp_path / "bad")) < 1e-5


@pytest.mark.slow
def test_frozen_matrices_in_half_precision_are_spread_as_well(two: Path, tmp_path: Path) -> None:
    Job("half", half=True, compute={"precision": "bfloat16"}).run(str(tmp_path), 0, 1)
    assert curve(two / "half") == pytest.approx(curve(tmp_path / "half"), rel=1e-3)
    assert all(weight.dtype == torch.float32 for weight in final(two / "half").values())


def test_labels_of_the_ranks_differ_much() -> None:
    """The cases above would not tell a mean over labels from a mean over ranks if they did not."""
    data = make_loop("unused", stage_of("lm"), layout="packed").data
    ratios = []
    for step in range(len(data.plan)):
        counts = [sum(b.label_tokens for b in load_step(data, step, rank, 2)) for rank in range(2)]
        ratios.append(max(counts) / max(1, min(counts)))
    assert max(ratios) > 2
    assert any(len(data.plan.batch(step)) < 4 for step in range(len(data.plan)))  # of four workers one has nothing
