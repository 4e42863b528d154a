"""Runs of two stages whose process is killed at seeded points and started again, until fifty kills are spent.

A program of its own, since it forks: it imports everything, starts no thread, and each attempt is a child. Prints JSON:
per run its seed, where each attempt was killed, and what was wrong at the end. Usage: fifty_kills.py FOLDER
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_helpers import Built, built, make_stage, sha256, two_stages, untimed

from components.training import loop, precision, shards
from components.training.checkpoint import Checkpoints
from components.training.loop import Alone
from components.training.optimiser_state import moments
from components.training.optimisers import build_optimiser
from infra import disk, storage

KILLS, KILLS_OF_A_RUN, KEPT = 50, 5, 2
# Where a process dies: the object and name of what it calls, how, and at most at which call of an attempt.
POINTS: dict[str, tuple[Any, str, str, int]] = {
    "write": (disk, "fill", "half", 4),
    "shard": (shards, "save_file", "after", 3),
    "rename": (os, "replace", "before", 6),
    "renamed": (os, "replace", "after", 6),
    "upload": (storage, "upload", "before", 3),
    "uploaded": (storage, "upload", "after", 3),
    "marker": (storage, "write_json", "before", 3),
    "marked": (storage, "write_json", "after", 3),
    "report": (Alone, "report", "before", 5),
    "optimiser": (torch.optim.AdamW, "step", "before", 5),
    "optimised": (torch.optim.AdamW, "step", "after", 5),
    "prefetch": (loop, "load_step", "before", 5),
    "prune": (storage, "remove_tree", "before", 3),
    "pruned": (storage, "remove_tree", "after", 3),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, call: int) -> None:
    """Make the process die at a call of a point, counted from 1."""
    owner, name, how, _ = POINTS[point]
    real, calls = getattr(owner, name), [0]

    @functools.wraps(real)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        last = calls[0] == call
        if last and how == "before":
            die()
        if last and how == "half":
            path, data = args
            Path(path).write_bytes(data[: len(data) // 2])
            die()
        result = real(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, name, deadly)


def note_acknowledged(folder: Path) -> None:
    """Write down each checkpoint whose marker is there: what the run may rely on from then on."""
    real = storage.write_json

    def noted(url: str, value: Any) -> None:
        real(url, value)
        if url.endswith("state.json"):
            with open(folder / "acknowledged", "a") as file:
                file.write(url.rpartition("/")[0] + "\n")

    storage.write_json = noted


def in_child(action: Callable[[], None]) -> int:
    """Run something in a process of its own, which may start threads; its wait status, 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:  # noqa: BLE001 the parent's frames must not run in the child
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def attempt(folder: Path, parts: Built, kill: tuple[str, int] | None) -> str:
    """Train in a child; how it ended: 'killed', 'done', or the error."""

    def train() -> None:
        note_acknowledged(folder)
        if kill is not None:
            arm(*kill)
        two_stages(folder, parts, layout="packed")

    status = in_child(train)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return "done" if os.WEXITSTATUS(status) == 0 else "failed, see stderr"


def check_acknowledged(folder: Path, parts: Built) -> None:
    """The newest checkpoints of each stage, as many as are kept, load, and none is older than the last acknowledged.

    A process that died between a marker and its note left a checkpoint that nobody was told of; it counts as well, for
    the next attempt goes on from it and forgets older ones.
    """
    noted = folder / "acknowledged"
    lines = noted.read_text().splitlines() if noted.exists() else []
    for stage in (make_stage("ctc"), make_stage()):
        url = str(folder / stage.name / "checkpoints")
        mine = sorted({line for line in lines if line.startswith(url)})
        complete = Checkpoints(url).complete()
        assert not mine or complete[0] >= mine[-1], f"{mine[-1]} was acknowledged, the newest is {complete[0]}"
        for checkpoint in sorted({*mine, *complete})[-KEPT:]:
            state = Checkpoints(url).load(checkpoint, held_by_checkpoint(parts, stage.train))
            assert checkpoint.endswith(f"step-{state['step']:07d}")


def held_by_checkpoint(parts: Built, train: tuple[str, ...]) -> dict[str, Tensor]:
    names = parts.model.freeze(train)
    parameters = dict(parts.model.named_parameters())
    stage = make_stage(train=train)
    weights = {f"weights/{name}": torch.zeros_like(parameters[name]) for name in names}
    return weights | moments(parts.model, build_optimiser(parts.model, stage))


def one_run(folder: Path, parts: Built, seed: int, straight: Path) -> dict[str, Any]:
    """Kill a run five times and let it end; what was killed, and what is wrong."""
    folder.mkdir()
    draw = random.Random(seed)
    order = draw.sample(sorted(POINTS), len(POINTS))
    killed: list[str] = []
    wrong: list[str] = []
    while len(killed) < KILLS_OF_A_RUN and order:
        point = order.pop()
        kill = (point, draw.randint(1, POINTS[point][3]))
        ended = attempt(folder, parts, kill)
        if ended != "killed":  # the run was over before that call
            wrong += [f"{kill}: {ended}"] if ended != "done" else []
            break
        killed.append(f"{kill[0]} {kill[1]}")
        if in_child(lambda: check_acknowledged(folder, parts)) != 0:
            wrong.append(f"after {kill} an acknowledged checkpoint was lost")
    if (last := attempt(folder, parts, None)) != "done":
        wrong.append(f"the last attempt: {last}")
        return {"seed": seed, "killed": killed, "wrong": wrong}
    for stage in ("align", "tune"):
        if sha256(folder / stage / "weights.safetensors") != sha256(straight / stage / "weights.safetensors"):
            wrong.append(f"{stage}: other weights")
        if untimed(folder / stage) != untimed(straight / stage):
            wrong.append(f"{stage}: other metrics")
    return {"seed": seed, "killed": killed, "wrong": wrong}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    precision.matmul_rate(torch.device("cpu"), torch.float32)  # measured once, for all children
    parts = built(dropout=0.1)
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a thread was started: its locks would be held for ever in a forked child")
    straight = folder / "straight"
    straight.mkdir()
    assert attempt(straight, parts, None) == "done"
    runs: list[dict[str, Any]] = []
    while sum(len(run["killed"]) for run in runs) < KILLS:
        runs.append(one_run(folder / f"run-{len(runs)}", parts, len(runs), straight))
    print(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
