"""Checkpoints: what was acknowledged loads bit for bit, whatever fails, is killed or changes its number of ranks."""

from __future__ import annotations

import errno
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from components.training import checkpoint, shards
from components.training.checkpoint import Checkpoints, Damaged
from components.training.optimiser_state import moments, restore
from components.training.weights import load_tensors, save_tensors
from infra import storage, stores


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
        return
    yield f"memory://{tmp_path.name}/checkpoints"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, none of them really."""
    slept: list[float] = []
    monkeypatch.setattr(checkpoint.time, "sleep", slept.append)
    return slept


def sample(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(6, 4, generator=generator)
    return {
        "bf16": torch.randn(5, generator=generator).to(torch.bfloat16),
        "fp32": wide,
        "turned": wide.t(),
        "fp64": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "int64": torch.tensor(2**53 + 1 + seed),
        "step": torch.tensor(3.0 + seed),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def bits(value: Tensor) -> bytes:
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)


def saved(checkpoints: Checkpoints, *steps: int, scores: dict[int, float] | None = None) -> None:
    for step in steps:
        checkpoints.save(step, sample(step), {"step": step}, (scores or {}).get(step))
    checkpoints.wait()


def loads(url: str) -> int:
    """Step of the newest complete checkpoint, once it is seen to be whole; 0 without one."""
    checkpoints = Checkpoints(url)
    newest = checkpoints.latest()
    if newest is None:
        return 0
    filled = blank(sample())
    step: int = checkpoints.load(newest, filled)["step"]
    assert same(filled, sample(step))
    return step


def folders(url: str) -> list[str]:
    """Names of the folders that hold files; memory:// lists empty ones too."""
    return sorted({name.partition("/")[0] for name in storage.find(url)})


def file_of(folder: str) -> str:
    (name,) = [name for name in storage.list_names(folder) if name.endswith(".safetensors")]
    return storage.join(folder, name)


# ---- one process ----------------------------------------------------------------------------------------------------


def test_every_type_comes_back_bit_for_bit(url: str) -> None:
    checkpoints, state = Checkpoints(url), {"step": 7, "ratio": 0.1, "names": ["ü", None]}
    checkpoints.save(7, sample(), state, score=1.5)
    state["step"] = 8  # what is changed afterwards is not saved
    checkpoints.wait()
    filled = blank(sample())
    newest = checkpoints.latest()
    assert newest == storage.join(url, "step-0000007")
    assert checkpoints.load(newest, filled) == {"step": 7, "ratio": 0.1, "names": ["ü", None]}
    assert same(filled, sample())
    assert checkpoints.load(newest, some := {"step": torch.tensor(0.0)})["step"] == 7
    assert some["step"] == 3.0


def test_training_may_go_on_while_a_checkpoint_is_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, tensors, gate = Checkpoints(url), sample(), threading.Event()
    upload = storage.upload
    monkeypatch.setattr(storage, "upload", lambda *parts: (gate.wait(60), upload(*parts)))
    checkpoints.save(1, tensors, {"step": 1})
    for value in tensors.values():
        value.zero_()
    assert checkpoints.latest() is None
    gate.set()
    checkpoints.wait()
    filled = blank(tensors)
    checkpoints.load(checkpoints.complete()[0], filled)
    assert same(filled, sample())


def test_the_newest_two_and_the_best_stay(url: str) -> None:
    checkpoints = Checkpoints(url)
    saved(checkpoints, 10, 20, 30, 40, 50, scores={10: 3.0, 20: 1.0, 30: float("nan"), 40: 1.0, 50: 2.0})
    assert folders(url) == ["step-0000020", "step-0000040", "step-0000050"]
    assert len(storage.find(url)) == 6
    assert (checkpoints.latest(), checkpoints.best()) == (f"{url}/step-0000050", f"{url}/step-0000020")
    saved(checkpoints, 60, scores={60: 0.5})
    assert checkpoints.complete() == [f"{url}/step-0000060", f"{url}/step-0000050"]
    checkpoints.clear()
    assert (checkpoints.complete(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    assert storage.find(url) == []


def test_steps_are_ordered_as_numbers(url: str) -> None:
    checkpoints = Checkpoints(url)
    saved(checkpoints, 9_999_999, 10_000_000)
    assert checkpoints.complete() == [f"{url}/step-10000000", f"{url}/step-9999999"]


def test_what_a_kill_left_is_swept_and_never_read(url: str) -> None:
    saved(Checkpoints(url), 10)
    for name in ("step-0000005/old-00000-of-00001.safetensors", "step-0000020/old-00001-of-00002.json"):
        storage.write_bytes(storage.join(url, name), b"{}")
    storage.write_bytes(storage.join(url, "step-0000015/state.json"), b"{")
    assert loads(url) == 10
    saved(Checkpoints(url), 20)  # the same step again, beside what the killed attempt left
    assert folders(url) == ["step-0000010", "step-0000020"]
    assert len(storage.find(storage.join(url, "step-0000020"))) == 2
    assert loads(url) == 20


def test_the_same_step_again_replaces_it_at_once(url: str) -> None:
    saved(Checkpoints(url, keep=1), 10, 20)
    again = Checkpoints(url, keep=1)
    again.save(20, sample(21), {"step": 21})
    again.wait()
    assert loads(url) == 21
    saved(again, 15)  # gone back: what is newer is not touched, what was just written is not pruned
    assert again.complete() == [f"{url}/step-0000020", f"{url}/step-0000015"]


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "header"])
def test_damage_is_found_before_a_tensor_is_touched(url: str, harm: str) -> None:
    checkpoints = Checkpoints(url)
    saved(checkpoints, 10, 20)
    newest, before = checkpoints.complete()
    shard = file_of(newest)
    data = bytearray(storage.read_bytes(shard))
    data[20 if harm == "header" else -1] ^= 1
    storage.remove_tree(shard)
    if harm != "gone":
        storage.write_bytes(shard, bytes(data[:-1] if harm == "cut" else data))
    filled = blank(sample())
    with pytest.raises(Damaged, match=f"{Path(shard).name}.*remove .*step-0000020.* and take the checkpoint before"):
        checkpoints.load(newest, filled)
    assert same(filled, blank(sample()))
    assert checkpoints.load(before, filled) == {"step": 10}
    assert same(filled, sample(10))


def test_another_models_checkpoint_is_refused(url: str) -> None:
    checkpoints = Checkpoints(url)
    saved(checkpoints, 10)
    newest = checkpoints.complete()[0]
    with pytest.raises(ValueError, match=r"step-0000010 has no 'more'"):
        checkpoints.load(newest, {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'fp32' is torch.float32 \(6, 4\) there and torch.float32 \(4, 6\) here"):
        checkpoints.load(newest, {"fp32": torch.zeros(4, 6)})
    with pytest.raises(ValueError, match=r"'step' is torch.float32 \(\) there and torch.float64"):
        checkpoints.load(newest, {"step": torch.tensor(0.0, dtype=torch.float64)})


def test_what_cannot_be_saved_is_refused_at_once(url: str) -> None:
    checkpoints = Checkpoints(url)
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save(1, {}, {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"'x' cannot be saved as torch\.complex64"):
        checkpoints.save(1, {"x": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(url, keep=0)
    assert storage.find(url) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_files_are_safetensors_that_torch_itself_reshards(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    saved(Checkpoints(str(tmp_path)), 10)
    folder = tmp_path / "step-0000010"
    filled = {name: value for name, value in blank(sample()).items() if value.numel()}
    dcp.load(filled, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert same(filled, {name: value for name, value in sample(10).items() if value.numel()})
    with safe_open(file_of(str(folder)), "pt") as opened:
        assert set(opened.keys()) == set(sample())
    marker = json.loads((folder / "state.json").read_text())
    assert [file["size"] for file in marker["files"]] == [Path(file_of(str(folder))).stat().st_size]


# ---- failing storage ------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, slept: list[float], seconds: float, error: OSError) -> None:
    """Let what writes and lists fail until so many seconds were slept."""

    def shaky(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if sum(slept) < seconds:
                raise error
            return action(*given)

        return call

    for name in ("upload", "write_bytes", "list_names"):
        monkeypatch.setattr(storage, name, shaky(getattr(storage, name)))


@pytest.mark.parametrize("seconds", [30, 60])
def test_an_outage_passes(url: str, seconds: float, monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    failing(monkeypatch, clock, seconds, OSError(errno.EIO, "Input/output error"))
    saved(Checkpoints(url), 10)
    assert loads(url) == 10
    assert seconds <= sum(clock) < 64


def test_a_lasting_outage_is_told_at_the_next_save(
    url: str, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    checkpoints = Checkpoints(url)
    saved(checkpoints, 10)
    with monkeypatch.context() as patched:
        failing(patched, clock, 1e9, OSError(errno.EIO, "Input/output error"))
        checkpoints.save(20, sample(20), {"step": 20})
        with pytest.raises(OSError, match=r"step-0000020: the checkpoint of step 20 was not written .*Input/output"):
            checkpoints.save(30, sample(30), {"step": 30})
    assert sum(clock) >= 60
    assert loads(url) == 10
    saved(checkpoints, 40)
    assert loads(url) == 40


@pytest.mark.parametrize("where", ["save_file", "upload", "write_json"])
def test_a_full_disk_is_said_at_once_and_leaves_nothing_behind(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    url = str(tmp_path)
    checkpoints = Checkpoints(url)
    saved(checkpoints, 10)
    error: Exception = OSError(errno.ENOSPC, "No space left on device")
    if where == "save_file":
        error = shards.SafetensorError("I/O error: No space left on device (os error 28)")

    def full(*given: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(shards if where == "save_file" else storage, where, full)
        checkpoints.save(20, sample(20), {"step": 20})
        with pytest.raises(
            OSError, match=r"step-0000020: the checkpoint of step 20 .*free disk space.*intact"
        ) as found:
            checkpoints.wait()
    assert found.value.errno == errno.ENOSPC
    assert clock == []
    assert [path.name for path in tmp_path.rglob("*") if ".tmp" in path.name or "scratch/" in str(path)] == []
    assert loads(url) == 10


def test_the_operating_systems_refusal_is_known_behind_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(str(tmp_path))
    monkeypatch.setattr(checkpoint, "FULL", (errno.EFBIG,))
    monkeypatch.setattr(checkpoint, "HOPELESS", (errno.EFBIG,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpoints.save(1, {"a": torch.zeros(1 << 18)}, {})
        with pytest.raises(OSError, match=r"step 1 was not written .*File too large.*free disk space") as found:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (found.value.errno, clock) == (errno.EFBIG, [])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# ---- kills ----------------------------------------------------------------------------------------------------------


def test_killed_before_or_after_any_storage_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each call to the store is where the process dies, before or after the call took effect."""
    attempt, died = stores.attempt, []
    for at in range(10_000):
        url, calls, acknowledged, lock = f"memory://{tmp_path.name}-{at}/checkpoints", [0], 0, threading.Lock()

        def deadly(where: str, action: Any, at: int = at, calls: list[int] = calls, lock: Any = lock) -> Any:
            with lock:
                calls[0] += 1
                here = calls[0]
            if here > at // 2 + 1 or (here == at // 2 + 1 and at % 2 == 0):
                raise Killed
            result = attempt(where, action)
            if here == at // 2 + 1:
                raise Killed
            return result

        with monkeypatch.context() as patched:
            patched.setattr(stores, "attempt", deadly)
            try:
                checkpoints = Checkpoints(url)
                for step in (10, 20, 30, 40):
                    saved(checkpoints, step, scores={20: 0.5})
                    acknowledged = step
            except Killed:
                died.append(acknowledged)
        assert loads(url) >= acknowledged
        saved(Checkpoints(url), 50)
        assert [storage.join(url, name) for name in folders(url)] == Checkpoints(url).complete()[::-1]
        assert loads(url) == 50
        fsspec.filesystem("memory").store.clear()
        if acknowledged == 40:
            break
    assert set(died) == {0, 10, 20, 30}
    assert len(died) > 60


SAVER = """
import sys, torch
from components.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
for step in range(int(sys.argv[2]), 10**6):
    checkpoints.save(step, {"a": torch.full((200_000,), float(step)), "b": torch.tensor(step)}, {"step": step})
    checkpoints.wait()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_processes_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    url, last = str(tmp_path / "checkpoints"), 0
    for turn in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, url, str(last + 1)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(0.05 + 0.037 * turn)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        acknowledged = int([line for line in lines if line.endswith("\n")][-1])
        checkpoints = Checkpoints(url)
        tensors = {"a": torch.zeros(200_000), "b": torch.tensor(0)}
        newest = checkpoints.latest()
        assert newest is not None
        last = checkpoints.load(newest, tensors)["step"]
        assert acknowledged <= last <= acknowledged + 1
        assert torch.equal(tensors["a"], torch.full((200_000,), float(last))) and tensors["b"] == last
        assert len(checkpoints.complete()) in (1, 2, 3)


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[Checkpoints]]:
    """Ranks in one process: their only collective call is replaced by its answer."""
    monkeypatch.setattr(checkpoint, "_largest", lambda number, world: number)
    monkeypatch.setattr(checkpoint, "POLL", (0.001, 0.01))

    def build(url: str, world: int) -> list[Checkpoints]:
        group = [Checkpoints(url, rank, world) for rank in range(world)]
        for each in group:
            each._run = group[0]._run
        return group

    return build


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
