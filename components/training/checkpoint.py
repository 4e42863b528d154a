"""Checkpoints of a stage: every rank writes its shard in the background; a marker that is written last makes it count.

    <url>/step-0000050/<attempt>-00001-of-00002.safetensors   what rank 1 wrote
                       <attempt>-00001-of-00002.json          "rank 1 is done", gone once the marker is there
                       state.json                             the marker: step, state, score, files with their sha256

Shards are safetensors in the layout of `torch.distributed.checkpoint`'s HuggingFace storage, and its planner reads them
into any other number of ranks. The ranks meet through files, so that no collective of the background thread can get
between those of training; the attempt's number in the names keeps apart what a killed run left.
Only what was trained so far is kept, on top of weights that anybody can rebuild from the preset and the seed.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import secrets
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from components.training.shards import TYPES, Damaged, Part, own_part, prepared, write_shard
from infra import storage
from infra.stores import shown

T = TypeVar("T")

MARKER = "state.json"
FIELDS = {"step", "state", "score", "world", "attempt", "files"}
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between the tries of a storage operation: over a minute
POLL = (0.05, 2.0)  # seconds between two looks for the other ranks' files, the first and the longest
PEERS = 1800.0  # seconds that a rank waits for the others
FULL = (errno.ENOSPC, errno.EDQUOT)
HOPELESS = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Save:
    """What the background thread needs to know of one `Checkpoints.save`."""

    step: int
    folder: str
    attempt: str
    parts: dict[str, Part]
    state: dict[str, Any]
    score: float | None


class Checkpoints:
    """The checkpoints of one stage below a URL, seen from one of `world` ranks.

    With more than one rank `torch.distributed` must be initialised, and the constructor, `save` and `load` are called
    by all of them in the same order. The newest `keep` checkpoints and the one with the lowest score are kept.
    """

    def __init__(self, url: str, rank: int = 0, world: int = 1, keep: int = 2) -> None:
        if keep < 1 or not 0 <= rank < world:
            raise ValueError(f"{shown(url)}: keep={keep} must be at least 1, and rank={rank} below world={world}")
        self.url, self.rank, self.world, self.keep = url, rank, world, keep
        self._run = _largest(secrets.randbits(62) if rank == 0 else 0, world)
        self._saves = 0
        self._host: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], score: float | None = None) -> None:
        """Copy tensors to host memory, return, and write them in the background.

        A plain tensor is the same on all ranks and written by one of them; of a DTensor each rank writes its shard.
        `state` is JSON, rank 0's is kept; a score that is not finite counts as none. Waits for the save before this
        one. Raises that save's error (see `wait`); ValueError or TypeError for a state that is not JSON and for a type
        of numbers that safetensors lacks.
        """
        self.wait()
        for name, tensor in tensors.items():
            if tensor.dtype not in TYPES.values():
                raise ValueError(f"{shown(self.url)}: {name!r} cannot be saved as {tensor.dtype}: convert it before")
        state = json.loads(json.dumps(state, allow_nan=False))  # a copy: training goes on changing its own
        self._saves += 1
        self._pending = self._pool.submit(
            self._write,
            _Save(
                step=step,
                folder=storage.join(self.url, f"step-{step:07d}"),
                attempt=f"{self._run:016x}-{self._saves}",
                parts=self._copied(tensors),
                state=state,
                score=score if score is not None and math.isfinite(score) else None,
            ),
        )

    def wait(self) -> None:
        """Return when all that was saved is complete.

        Raises OSError for a save that failed on any rank, a minute of tries included; older checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Part]:
        """This rank's share in host memory; the buffers serve again, which spares page faults and pinning."""
        parts = {name: own_part(tensors[name], i, self.rank, self.world) for i, name in enumerate(sorted(tensors))}
        copies, host = {}, {}
        for name, part in parts.items():
            if part is None:
                continue
            source, buffer = part.tensor, self._host.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            host[name] = buffer.copy_(source, non_blocking=source.is_cuda)
            copies[name] = Part(buffer, part.offsets)
        if any(part is not None and part.tensor.is_cuda for part in parts.values()):
            torch.cuda.synchronize()
        self._host = host
        return copies

    def _write(self, save: _Save) -> None:
        try:
            mine = _patient(partial(write_shard, self._shard(save, self.rank, ".safetensors"), save.parts))
            if self.rank:
                _patient(partial(storage.write_json, self._shard(save, self.rank, ".json"), {"file": mine}))
                self._await_commit(save)
                return
            files = [mine, *self._files_of_others(save)]
            marker = {"step": save.step, "score": save.score, "world": self.world, "attempt": save.attempt}
            written = marker | {"files": files, "state": save.state}
            _patient(partial(storage.write_json, storage.join(save.folder, MARKER), written))
        except (OSError, ValueError) as error:
            if self.world > 1:  # the others would wait for their whole limit
                with suppress(OSError):
                    storage.write_json(self._shard(save, self.rank, ".json"), {"error": str(error)})
            raise _explained(save, error) from error
        try:
            self._prune(save, {file["name"] for file in files})
        except OSError as error:  # the checkpoint is safe, and the next save tries again
            log.warning("%s: old checkpoints are still there (%s)", shown(self.url), error)

    def _shard(self, save: _Save, rank: int, suffix: str) -> str:
        return storage.join(save.folder, f"{save.attempt}-{rank:05d}-of-{self.world:05d}{suffix}")

    def _files_of_others(self, save: _Save) -> list[dict[str, Any]]:
        """What the other ranks wrote, in their order, when all of them have."""
        notes: dict[int, dict[str, Any]] = {}

        def look() -> bool:
            names = set(_patient(partial(storage.list_names, save.folder)))
            for rank in range(1, self.world):
                url = self._shard(save, rank, ".json")
                if rank not in notes and url.rpartition("/")[2] in names:
                    notes[rank] = _patient(partial(storage.read_json, url))
                    if "error" in notes[rank]:
                        raise OSError(f"rank {rank}: {notes[rank]['error']}")
            return len(notes) == self.world - 1

        _poll(look, lambda: f"ranks {sorted({*range(1, self.world)} - {*notes})} did not write their shards")
        return [notes[rank]["file"] for rank in range(1, self.world)]

    def _await_commit(self, save: _Save) -> None:
        """Return when the marker is there, or was: only after it is written does rank 0 take this rank's note away."""
        note, refusal = (self._shard(save, rank, ".json") for rank in (self.rank, 0))

        def look() -> bool:
            names = _patient(partial(storage.list_names, save.folder))
            if refusal.rpartition("/")[2] in names:
                raise OSError(f"rank 0: {_patient(partial(storage.read_json, refusal))['error']}")
            marker = _patient(partial(_marker, save.folder)) if MARKER in names else None
            return note.rpartition("/")[2] not in names or (marker or {}).get("attempt") == save.attempt

        _poll(look, lambda: f"rank 0 did not write {MARKER}")

    def _prune(self, save: _Save, files: set[str]) -> None:
        """Forget what is older than the checkpoint just written, but for `keep` and the best, and what kills left.

        A folder loses its marker first: killed in between, it is unfinished work and not a damaged checkpoint. Folders
        of later steps stay: a run that went back to an earlier checkpoint writes those steps again.
        """
        for name in storage.list_names(save.folder):
            if name not in files | {MARKER}:
                storage.remove_tree(storage.join(save.folder, name))
        if storage.is_local(save.folder):
            storage.remove_tree(storage.join(save.folder, ".scratch"))
        older = {step: name for step, name in self._steps().items() if step < save.step}
        markers = {step: _marker(storage.join(self.url, name)) for step, name in older.items()}
        kept = sorted(step for step, marker in markers.items() if marker)[::-1][: self.keep - 1]
        best = self.best()
        for step, name in older.items():
            folder = storage.join(self.url, name)
            if step not in kept and folder != best:
                storage.remove_tree(storage.join(folder, MARKER))
                storage.remove_tree(folder)

    def clear(self) -> None:
        """Forget all checkpoints, when nothing is being saved any more; rank 0 removes them, the oldest first."""
        self.wait()
        self._host = {}
        if self.rank == 0:
            for folder in reversed(self.complete()):
                _patient(partial(storage.remove_tree, storage.join(folder, MARKER)))
            _patient(partial(storage.remove_tree, self.url))

    # ---- finding and loading ----------------------------------------------------------------------------------------

    def _steps(self) -> dict[int, str]:
        """Step -> name of every checkpoint's folder, complete or not, in the order of steps."""
        names = _patient(partial(storage.list_names, self.url))
        return dict(sorted((int(name[5:]), name) for name in names if re.fullmatch(r"step-\d+", name)))

    def _complete(self) -> list[tuple[str, dict[str, Any]]]:
        folders = [storage.join(self.url, name) for name in reversed(self._steps().values())]
        markers = [(folder, _patient(partial(_marker, folder))) for folder in folders]
        return [(folder, marker) for folder, marker in markers if marker is not None]

    def complete(self) -> list[str]:
        """URLs of all complete checkpoints, the newest first. OSError where the storage does not answer."""
        return [folder for folder, _ in self._complete()]

    def latest(self) -> str | None:
        """URL of the newest complete checkpoint, None if there is none."""
        return next(iter(self.complete()), None)

    def best(self) -> str | None:
        """URL of the complete checkpoint with the lowest score (of equals the oldest), None if none has a score."""
        scored = [(marker["score"], marker["step"], url) for url, marker in self._complete()]
        return min((entry for entry in scored if entry[0] is not None), default=(None, 0, None))[2]

    def load(self, folder: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill tensors (plain or DTensor) from a checkpoint, whatever number of ranks wrote it; returns its state.

        Tensors that the checkpoint has beyond `tensors` are left out. Raises, on all ranks if on one, and before any
        tensor is touched: `Damaged` (a ValueError) for a checkpoint whose bytes are not those that were written, so
        that the caller may take the one before, the next of `complete()`; ValueError if it lacks a tensor or has
        another shape or type; OSError where the storage does not answer.
        """
        failure: OSError | ValueError | None = None
        with tempfile.TemporaryDirectory() as scratch:
            try:
                marker = _patient(partial(_marker, folder))
                if marker is None:
                    raise Damaged(f"{shown(folder)} has no readable {MARKER}: remove it and take the checkpoint before")
                read = _patient(partial(prepared, folder, marker["files"], tensors, Path(scratch)))
            except FileNotFoundError as error:
                failure = Damaged(f"a file is gone ({error}): remove {shown(folder)} and take the checkpoint before")
            except (OSError, ValueError) as error:
                failure = error
            worst = _largest(0 if failure is None else 1 if isinstance(failure, Damaged) else 2, self.world)
            if failure is not None:
                raise failure
            if worst:
                kind = Damaged if worst == 1 else OSError
                raise kind(f"{shown(folder)} could not be read by another rank: its message says why")
            read()
        assert marker is not None
        state: dict[str, Any] = marker["state"]
        return state


# ---- helpers --------------------------------------------------------------------------------------------------------


def _patient(action: Callable[[], T]) -> T:
    """`action`, again for over a minute while the storage fails; at once what waiting does not mend (a full disk)."""
    for delay in DELAYS:
        try:
            return action()
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            if error.errno in HOPELESS:
                raise
            log.warning("%s; trying again in %s s", error, delay)
            time.sleep(delay)
    return action()


def _largest(number: int, world: int) -> int:
    """The largest of the ranks' numbers; a collective call if there are several."""
    if world == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(number, dtype=torch.int64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def _poll(look: Callable[[], bool], missing: Callable[[], str]) -> None:
    began, pause = time.monotonic(), POLL[0]
    while not look():
        if time.monotonic() - began > PEERS:
            raise TimeoutError(f"{missing()} within {PEERS:.0f} s: their logs say why")
        time.sleep(pause)
        pause = min(pause * 1.5, POLL[1])


def _marker(folder: str) -> dict[str, Any] | None:
    """The marker of a folder; None where there is none or its bytes are not one. OSError if that cannot be told."""
    try:
        marker = storage.read_json(storage.join(folder, MARKER))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        log.warning("%s counts as unfinished: %s", shown(folder), error)
        return None
    return marker if isinstance(marker, dict) and marker.keys() >= FIELDS else None


def _explained(save: _Save, error: OSError | ValueError) -> OSError:
    number = error.errno if isinstance(error, OSError) else None
    remedy = "free disk space" if number in FULL else "check that storage"
    text = (
        f"{shown(save.folder)}: the checkpoint of step {save.step} was not written ({error}): {remedy} and run the "
        "stage again; it goes on from the last complete checkpoint, which is intact"
    )
    return OSError(text) if number is None else OSError(number, text)
