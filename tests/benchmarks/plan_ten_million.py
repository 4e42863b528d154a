"""How long the plan of ten million samples takes, and how much memory: `python tests/benchmarks/plan_ten_million.py`.

Each case runs in a process of its own, so that the peak of one does not hide that of another. The peak counts the
samples' arrays as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from components.batching.plan import Layout, plan_stage
from components.batching.samples import Samples
from models.recipe import Curriculum, Stage

BUDGET = 4096
SHARDS = 2000
CASES = [(layout, pacing) for layout in get_args(Layout) for pacing in ("random", "root")]


def mixed_samples(count: int) -> Samples:
    """Samples of three tasks and four data sets in `SHARDS` shards; lengths lognormal around 120 tokens."""
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.standard_normal(count, dtype=np.float32) * np.float32(0.6) + np.float32(4.6))
    tokens = np.clip(tokens, 8, 2000).astype(np.int32)
    return Samples(
        row=np.arange(count, dtype=np.int32),
        task=rng.integers(0, 3, count, dtype=np.int8),
        collection=rng.integers(0, 4, count, dtype=np.int8),
        shard=(np.arange(count) * SHARDS // count).astype(np.int32),
        tokens=tokens,
        labels=np.full(count, 10, dtype=np.int32),
        seconds=tokens.astype(np.float32) / 12,
        audio=np.ones(count, dtype=np.bool_),
        tasks=("asr", "label:emotion", "translate:de"),
        collections=("books", "calls", "news", "talks"),
        measures={"text_length": tokens // 3},
    )


def measure(count: int, layout: Layout, pacing: str) -> dict[str, float]:
    """Seconds of `plan_stage`, peak memory of the process in GB, and what the plan holds."""
    samples = mixed_samples(count)
    curriculum = Curriculum() if pacing == "random" else Curriculum(order="duration", pacing="root")
    tasks = {"asr": 1.0, "labels": 1.0, "translation": 1.0}
    stage = Stage(name="benchmark", train=("lora",), tasks=tasks, batch_tokens=BUDGET, curriculum=curriculum)
    began = time.perf_counter()
    plan = plan_stage(stage, samples, 0, layout)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    return {"seconds": seconds, "peak": peak, "batches": len(plan), "entries": len(plan.order)}


def measure_apart(count: int, layout: str, pacing: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--samples", str(count), "--case", layout, pacing]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--case", nargs=2, metavar=("LAYOUT", "PACING"), help="one case, in this process, as JSON")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.samples, *given.case)))
        return
    print(f"{given.samples:,} samples, one epoch, batches of {BUDGET} tokens")
    print(f"{'layout':<10}{'order':<8}{'seconds':>8}{'peak GB':>9}{'batches':>10}")
    for layout, pacing in CASES:
        found = measure_apart(given.samples, layout, pacing)
        print(
            f"{layout:<10}{pacing:<8}{found['seconds']:>8.1f}{found['peak']:>9.2f}{found['batches']:>10,}", flush=True
        )


if __name__ == "__main__":
    main()
