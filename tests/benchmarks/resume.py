"""From the command to the first new step, far into a plan and near its start: `python tests/benchmarks/resume.py`.

One stage of over a million steps (a tiny model, so that nothing hides what depends on the position). It is stopped
after the checkpoint of step 10 and, as a copy, after that of step 1,000,000, with the metrics of all steps before.
Each time a fresh process opens the plan, loads the checkpoint, makes the next batch and takes the step; the clock runs
from before the process starts until the step is done. `inside` leaves out what Python needs to import.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measuring import Comparison, interleaved, machine, middle, verdict
from training_helpers import built, make_row, make_stage

from components.batching.stage_plan import lengths_only, open_plan, publish_plan
from components.training.history import write_segment
from components.training.loop import Alone, StageLoop, train_stage
from models.rendering import Audio

BAR = 1.10
NEAR, FAR, PIECE = 10, 1_000_000, 1000
FRAMES = 20
ROWS = [make_row(f"c{i}", "turn on the light") for i in range(2000)]
STAGE = make_stage(epochs=520.0, batch_tokens=110, checkpoint_every=NEAR)  # one sample a step


class Stops(Alone):
    """Ends the process after some new steps; says when the first was done."""

    def __init__(self, steps: int, entered: float) -> None:
        self.left, self.entered = steps, entered

    def report(self, metrics: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            print(json.dumps({"step": metrics["step"], "inside": time.monotonic() - self.entered}), flush=True)
            os._exit(0)


def go_on(folder: str, steps: int) -> None:
    """What a process does that is told to train the stage."""
    entered = time.monotonic()
    torch.set_num_threads(1)
    parts = built()
    features = torch.randn(FRAMES, 32, generator=torch.Generator().manual_seed(0))

    def measure(key: str) -> Audio:
        return Audio(lengths_only({"speech": FRAMES}))

    publish_plan(folder, STAGE, ROWS, parts.model, parts.tokenizer, measure, 0, "packed")
    data = open_plan(folder, STAGE, ROWS, parts.model, parts.tokenizer, lambda _: Audio({"speech": features}))
    assert len(data.plan) > FAR + NEAR, len(data.plan)
    train_stage(StageLoop(STAGE, data, parts.model, parts.tokenizer, folder, 0, Stops(steps, entered)), [])


def started(folder: Path, steps: int) -> dict[str, float]:
    """A fresh process that trains `steps` steps; what it said, and its seconds in all."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--go", str(folder), str(steps)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1]) | {"whole": time.monotonic() - began}


def far_from(near: Path, far: Path) -> None:
    """The same run a million steps on: its metrics in pieces, and a checkpoint that it writes itself at that step."""
    shutil.copytree(near, far)
    line = json.loads(next((near / "metrics").glob("*.jsonl")).read_text().splitlines()[0])
    for end in range(PIECE, FAR, PIECE):
        write_segment(str(far), end, [line | {"step": step} for step in range(end - PIECE, end)])
    last = FAR - NEAR
    checkpoints = far / "checkpoints"
    moved = (checkpoints / f"step-{NEAR:07d}").rename(checkpoints / f"step-{last:07d}")
    marker = json.loads((moved / "state.json").read_text())
    marker["step"] = marker["state"]["step"] = last
    (moved / "state.json").write_text(json.dumps(marker))
    started(far, NEAR + 2)
    assert (checkpoints / f"step-{FAR:07d}" / "state.json").exists()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="each starts both twice")
    parser.add_argument("--go", nargs=2, metavar=("FOLDER", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.go:
        go_on(given.go[0], int(given.go[1]))
        return 1  # it ends its process by itself
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        near, far = Path(folder) / "near", Path(folder) / "far"
        started(near, NEAR + 2)
        far_from(near, far)
        inside: dict[str, list[float]] = {"near": [], "far": []}

        def measured(name: str, at: Path, position: int) -> float:
            found = started(at, 1)
            assert found["step"] == position
            inside[name].append(found["inside"])
            return 1 / found["whole"]

        ways = {"near": partial(measured, "near", near, NEAR), "far": partial(measured, "far", far, FAR)}
        rates = interleaved(ways, given.rounds)
    print(f"\n{'position':<12}{'seconds, from the command':<30}inside")
    for name, position in (("near", NEAR), ("far", FAR)):
        print(f"{position:<12,}{middle([1 / r for r in rates[name]], '.2f'):<30}{middle(inside[name], '.2f')}")
    print(f"inside alone: {statistics.median(inside['far']) / statistics.median(inside['near']):.2f}x")
    compared = Comparison(rates["far"], rates["near"])
    return verdict("resume, seconds far against near", compared.ratio, BAR, compared.drift, at_most=True)


if __name__ == "__main__":
    sys.exit(main())
