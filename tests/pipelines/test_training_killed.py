"""One of several training workers is killed: Ray Train starts them again, and the run ends by itself as if unbroken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipelines.conftest import earloom, hashes, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORDS = ("--arch", "funasr_llm", "preset=tiny", "per_shard=8", "dataset=killed", "workers=2", "cpus=2")
LONG = ("lora.max_steps=80", "lora.epochs=100", "lora.checkpoint_every=5")


def training_workers(process: Any) -> list[psutil.Process]:
    """Processes below `process` that train; Ray names them after what they do."""
    tree = psutil.Process(process.pid).children(recursive=True)
    return [one for one in tree if one.is_running() and "RayTrainWorker" in " ".join(one.cmdline())]


def killed_once(process: Any, ready: Callable[[], bool]) -> int:
    """SIGKILL to one training worker as soon as `ready()`; returns how many there were."""
    wait_for(process, ready)
    workers = training_workers(process)
    workers[-1].kill()
    return len(workers)


def test_a_killed_worker_costs_time_only(corpus: Path, tmp_path: Path, prefect_url: str) -> None:
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    words = ("--data", str(corpus), *WORDS, *(f"recipe.stages.{setting}" for setting in LONG))
    for stage in ("ingest", "cache"):
        process = earloom(stage, *words, lake=broken, server=prefect_url)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    shutil.copytree(broken, straight)

    process = earloom("train", *words, lake=broken, server=prefect_url)
    stage = "runs/*/stages/2-lora-*"
    assert killed_once(process, lambda: any(broken.glob(f"{stage}/checkpoints/step-000000?/state.json"))) == 2
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

    process = earloom("train", *words, lake=straight, server=prefect_url)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    digests = [hashes(lake, "runs/*/stages/*/weights.safetensors") for lake in (broken, straight)]
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]
    (metrics,) = broken.glob(f"{stage}/metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(80))
    (manifest,) = broken.glob(f"{stage}/manifest.json")
    assert json.loads(manifest.read_text())["world"] == 2
