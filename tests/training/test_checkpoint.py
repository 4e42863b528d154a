"""Checkpoints of one process: what was acknowledged loads bit for bit, whatever fails or is killed."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoint_helpers import blank, file_of, folders, loads, same, sample, saved
from safetensors import safe_open

from components.training import checkpoint, shards
from components.training.checkpoint import Checkpoints, Damaged
from infra import storage, stores


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


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


@pytest.mark.slow
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
