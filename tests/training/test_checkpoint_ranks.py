"""Checkpoints of several ranks, of optimisers and in an object store: any number of ranks reads any other's."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_helpers import folders, loads, same, sample, saved
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from components.training import checkpoint
from components.training.checkpoint import Checkpoints, Damaged
from components.training.optimiser_state import moments, restore
from components.training.weights import load_tensors, save_tensors
from infra import storage
from infra.processes import free_port


def test_replicas_share_the_writing_and_any_world_reads_it(url: str, ranks: Any) -> None:
    for world, step in ((3, 10), (2, 20), (4, 30)):
        group = ranks(url, world)
        for each in group:
            each.save(step, sample(step), {"step": step})
        for each in reversed(group):
            each.wait()
        marker = storage.read_json(storage.join(url, f"step-{step:07d}", "state.json"))
        assert len(marker["files"]) == world
        assert all(file["size"] > file["header"] for file in marker["files"])
        assert loads(url) == step


def test_a_rank_that_dies_leaves_the_checkpoint_unfinished(
    url: str, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PEERS", 0.2)
    first, *_ = ranks(url, 3)
    first.save(10, sample(), {"step": 10})
    with pytest.raises(OSError, match=r"step 10 was not written .ranks \[1, 2\] did not write their shards"):
        first.wait()
    assert loads(url) == 0
    _, second = ranks(url, 2)  # its note is of another attempt than rank 0's next: it must not count
    second.save(10, sample(99), {"step": 10})
    with pytest.raises(OSError, match=r"rank 0 did not write state\.json"):
        second.wait()
    saved(Checkpoints(url), 10)
    assert loads(url) == 10
    assert len(storage.find(url)) == 2


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_tells_the_others(url: str, ranks: Any, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write_shard

    def full(where: str, parts: Any) -> Any:
        if f"-{broken:05d}-of-" in where:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(where, parts)

    monkeypatch.setattr(checkpoint, "write_shard", full)
    group = ranks(url, 2)
    for each in group:
        each.save(10, sample(), {"step": 10})
    for each in group:
        with pytest.raises(OSError, match=r"the checkpoint of step 10 was not written .*No space left"):
            each.wait()
    assert loads(url) == 0


def model_and_optimiser(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1), nn.Linear(1, 3))  # 7, 1 and 3 do not split evenly
    if sharded:
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def all_of(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | moments(model, optimiser)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    return {name: value.detach().clone() for name, value in full.items()}


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimiser.zero_grad()
        model(torch.linspace(-1, 1, 20).view(4, 5) + step).square().mean().backward()
        optimiser.step()


def _sharded(rank: int, world: int, port: int, url: str, step: int, expected: str, damage: bool) -> None:
    """Load the newest checkpoint, compare it with `expected`, train on, and save another with its whole tensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, optimiser = model_and_optimiser(sharded=True)
    checkpoints = Checkpoints(url, rank, world)
    tensors = all_of(model, optimiser)
    if damage:
        with pytest.raises(Damaged, match=r"damaged|by another rank"):
            checkpoints.load(checkpoints.complete()[0], tensors)
        dist.destroy_process_group()
        return
    newest = checkpoints.latest()
    if newest is not None:
        checkpoints.load(newest, tensors)
        assert same(whole(tensors), load_tensors(expected))
    train(model, optimiser, 3)
    checkpoints.save(step, tensors, {"step": step})
    kept = whole(tensors)
    train(model, optimiser, 2)  # goes on while the checkpoint is being written
    checkpoints.wait()
    if rank == 0:
        save_tensors(expected, kept)
    dist.destroy_process_group()


def spawn(world: int, *arguments: Any) -> None:
    port = free_port()
    mp.spawn(_sharded, (world, port, *arguments), nprocs=world)  # type: ignore[no-untyped-call]


@pytest.mark.slow
def test_shards_of_two_ranks_load_on_one_two_and_three(tmp_path: Path) -> None:
    url, expected = str(tmp_path / "checkpoints"), str(tmp_path / "expected.safetensors")
    for world, step in ((2, 10), (2, 20), (3, 30)):
        spawn(world, url, step, expected, False)
        model, optimiser = model_and_optimiser(sharded=False)  # one process without a process group
        tensors = all_of(model, optimiser)
        checkpoints = Checkpoints(url)
        newest = checkpoints.latest()
        assert newest is not None and checkpoints.load(newest, tensors) == {"step": step}
        assert same(whole(tensors), load_tensors(expected))
        assert tensors["moments/step/0.weight"] == 3.0 * step / 10
    shards = sorted(path for path in Path(str(newest)).iterdir() if path.suffix == ".safetensors")
    assert len(shards) == 3
    shards[2].write_bytes(shards[2].read_bytes()[:-1] + b"?")
    spawn(2, url, 60, expected, True)  # both ranks refuse it


# ---- optimiser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_moments_restored_train_on_to_the_same_bits(url: str, fused: bool) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    model, optimiser = fresh()
    train(model, optimiser, 3)
    Checkpoints(url).save(3, all_of(model, optimiser), {})
    again, second = fresh()
    kept = whole(moments(model, optimiser))
    assert set(kept) == {f"moments/{k}/{p}" for k in ("step", "exp_avg", "exp_avg_sq") for p in ("weight", "bias")}
    for _ in range(200):
        if newest := Checkpoints(url).latest():
            break
        time.sleep(0.01)
    assert newest is not None
    Checkpoints(url).load(newest, all_of(again, second))
    assert same(whole(moments(again, second)), kept)
    train(model, optimiser, 2)
    train(again, second, 2)
    assert same(whole(all_of(again, second)), whole(all_of(model, optimiser)))
    restore(again, second, kept)
    assert same(whole(moments(again, second)), kept)


def test_moments_made_early_change_nothing() -> None:
    ends = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        if early:
            assert all(not value.any() and not value.requires_grad for value in moments(model, optimiser).values())
        train(model, optimiser, 3)
        ends.append(whole(all_of(model, optimiser)))
    assert same(*ends)


# ---- an object store ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_object_store(bucket: str, ranks: Any) -> None:
    url = storage.join(bucket, "runs/a")
    for step in (10, 20, 30):
        group = ranks(url, 2)
        for each in group:
            each.save(step, sample(step), {"step": step}, score=float(step))
        for each in group:
            each.wait()
    assert folders(url) == ["step-0000010", "step-0000020", "step-0000030"]
    assert len(storage.find(url)) == 9
    assert loads(url) == 30
    storage.write_bytes(storage.join(url, "step-0000030/state.json"), b"not JSON")
    assert loads(url) == 20
    Checkpoints(url).clear()
    assert storage.find(url) == []
