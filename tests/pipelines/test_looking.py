"""Look before training: plan, explain and fit-memory use the code and the artefacts that training uses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.conftest import earloom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = ("preset=tiny", "per_shard=8", "dataset=looked")


@pytest.fixture(scope="module")
def looked(corpus: Path, tmp_path_factory: pytest.TempPathFactory, prefect_url: str) -> Any:
    """Runs a command on a lake in which the corpus is ingested and cached; returns what it printed."""
    lake = tmp_path_factory.mktemp("looked") / "lake"

    def command(name: str, *words: str) -> str:
        process = earloom(
            name, "--arch", "funasr_llm", "--data", str(corpus), *words, *SETTINGS, lake=lake, server=prefect_url
        )
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return str(output)

    command("ingest")
    command("cache")
    command.lake = lake  # type: ignore[attr-defined]
    return command


def test_plan_is_shown_drawn_and_then_used_by_training(looked: Any) -> None:
    words = ("curriculum.order=text", "recipe.stages.lora.max_steps=6")
    printed = looked("plan", *words)
    assert re.search(r"lora +packed +asr 100% +\d+ +\d+ +6 ", printed)
    plans = sorted(looked.lake.glob("runs/funasr_llm/stages/2-lora-*/plan"))
    assert len(plans) == 1
    before = {path.name: path.read_bytes() for path in plans[0].glob("*.*") if path.is_file()}
    assert set(before) == {"plan.html", "plan.json", "plan.safetensors", "samples.parquet"}
    assert before["plan.html"].count(b"<svg") >= 3
    looked("train", *words)
    assert {path.name: path.read_bytes() for path in plans[0].glob("*.*") if path.is_file()} == before
    steps = [json.loads(line) for line in (plans[0].parent / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6
    assert {"samples_per_second", "data_wait", "padding", "mfu"} <= set(steps[0])
    # A changed stage runs again, and nothing before it.
    changed = looked("train", *words, "recipe.stages.lora.optimiser.lr=0.0002")
    assert re.search(r"train adaptor +up to date", changed)
    assert re.search(r"train lora +done +6 steps", changed)
    assert len(list(looked.lake.glob("runs/funasr_llm/stages/1-adaptor-*"))) == 1


def test_explain_shows_the_labels_of_a_batch(looked: Any, tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    printed = looked("explain", "--stage", "lora", "--step", "1", "--page", str(page))
    labels = int(re.search(r"labels (\d+)", printed)[1])  # type: ignore[index]
    assert printed.count("⟦") - 1 == labels  # and once in the legend
    assert page.read_text().count("train-") >= 1
    key = re.search(r"^(\S+)  row 1, segment 1", printed, re.MULTILINE)
    assert key is not None
    alone = looked("explain", "--stage", "lora", "--clip", key[1])
    assert f"{key[1]}  row 1, segment 1" in alone


def test_a_memory_fit_is_kept_for_the_stage(looked: Any) -> None:
    printed = looked("fit-memory", "--stage", "lora")
    assert re.search(r"lora +512 +512 +(packed|bucketed) ", printed)
    (kept,) = looked.lake.glob("fits/*.json")
    fit = json.loads(kept.read_text())
    assert fit["micro_tokens"] == 512
    assert set(fit["tokens_per_second"]) == {"packed", "bucketed"}
    assert 0 < fit["fixed_bytes"] < fit["limit_bytes"]
    # What was found is used, by the plan as well: with the other form kept there, it is that one.
    kept.write_text(json.dumps(fit | {"layout": "bucketed"}))
    printed = looked("plan", "--stage", "lora", "curriculum.reverse=true", "recipe.stages.lora.curriculum.order=text")
    assert re.search(r"lora +bucketed ", printed)


def test_sharded_training_on_two_workers_writes_events_and_whole_weights(looked: Any) -> None:
    from safetensors import safe_open

    looked("train", "workers=2", "compute.parallel=fsdp", "compute.tensorboard=true", "recipe.stages.lora.max_steps=5")
    (stage,) = [p.parent for p in looked.lake.glob("runs/*/stages/2-*/manifest.json") if '"world": 2' in p.read_text()]
    assert list((stage / "tensorboard").glob("events.out.tfevents.*"))
    with safe_open(stage / "weights.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["connector.linear1.weight"] == (48, 64)
    assert any("lora_A" in name for name in shapes)
