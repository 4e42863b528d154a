"""Stage 4: answers to held-out clips before and after training, and what they are worth."""

from __future__ import annotations

import json
import time
from typing import Any

from prefect import flow, task

from components.curriculum.tasks import samples_of
from components.evaluation.metrics import Hypothesis, Scores, main_metric, score, score_before
from components.registry.records import INPUTS, inputs
from components.schema import StageReport
from components.shards.index import read_rows
from infra import storage
from pipelines import artifacts, remote, retrying
from pipelines.config import RunConfig
from pipelines.jobs import run_stage
from pipelines.locate import NotThere, Workspace
from pipelines.progress import console
from pipelines.workers.evaluate import answer_clips
from pipelines.workspace import workspace

HYPOTHESES, SCORES = "hypotheses.jsonl", "scores.json"


@flow(name="evaluate", description="Held-out clips, before and after training")
def evaluate(config: RunConfig) -> StageReport:
    """Score the trained and the untrained model on the same held-out clips."""
    (report,) = run_stage("evaluate", config, lambda: evaluate_model(workspace(config)))
    work = workspace(config)
    artifacts.show_scores(*read_scores(work), read_hypotheses(work))
    return report


@task(name="evaluate model", **retrying.EVALUATE)
def evaluate_model(work: Workspace) -> StageReport:
    began = time.monotonic()
    root = storage.join(work.run_root, "evaluation")
    if storage.exists(storage.join(root, SCORES)):
        scores, before = read_scores(work)
        return StageReport(
            stage="evaluate",
            state="up to date",
            reused=_clips(scores),
            unit="clips",
            seconds=time.monotonic() - began,
            note=_note(scores, before),
            url=root,
        )
    rows = _held_out(work)
    if not all(storage.exists(storage.join(url, "manifest.json")) for _, url in work.stages):
        raise NotThere(
            "the model is not trained with these settings: run `earloom train` first, or `earloom run` for all"
        )
    tasks = _tasks(work, rows)
    console.print(
        f"  evaluate: {len(rows)} clips of split {work.config.split}, {', '.join(tasks)}, before and after training"
    )
    settings = {
        "arch": work.config.arch,
        "preset": work.preset.model_dump(mode="json"),
        "seed": work.preset.recipe.seed + work.config.seed,
        "inputs": work.model_inputs,
        "weights": storage.join(work.stages[-1][1], "weights.safetensors"),
        "rows": rows,
        "tasks": tasks,
        "options": work.config.eval_options,
        "audio_root": work.audio_root,
        "threads": work.config.cores(),
        "baseline": work.config.baseline_clips,
    }
    made_from = inputs([work.audio], list(work.features.values()), [url for _, url in work.stages])
    storage.write_json(storage.join(work.run_root, INPUTS), made_from)
    hypotheses = [Hypothesis.model_validate(line) for line in remote.call(work.config, answer_clips, settings)]
    scores, before = score(hypotheses), score_before(hypotheses)
    storage.write_text(storage.join(root, HYPOTHESES), "".join(h.model_dump_json() + "\n" for h in hypotheses))
    both = {"scores": scores.model_dump(mode="json"), "before": before.model_dump(mode="json") if before else None}
    storage.write_json(storage.join(root, SCORES), both)
    return StageReport(
        stage="evaluate",
        state="done",
        done=len(hypotheses),
        unit="clips",
        seconds=time.monotonic() - began,
        note=_note(scores, before),
        url=root,
    )


def read_scores(work: Workspace) -> tuple[Scores, Scores | None]:
    """Scores after and before training. Raises NotThere if the run was not evaluated."""
    url = storage.join(work.run_root, "evaluation", SCORES)
    if not storage.exists(url):
        raise NotThere(
            "the model is not evaluated with these settings: run `earloom evaluate` first, or `earloom run` for all"
        )
    both = storage.read_json(url)
    return Scores.model_validate(both["scores"]), Scores.model_validate(both["before"]) if both["before"] else None


def read_hypotheses(work: Workspace) -> list[Hypothesis]:
    lines = storage.read_text(storage.join(work.run_root, "evaluation", HYPOTHESES)).splitlines()
    return [Hypothesis.model_validate(json.loads(line)) for line in lines]


def _held_out(work: Workspace) -> list[dict[str, Any]]:
    rows = list(read_rows(work.audio_root).where("split", work.config.split))
    tasks = _tasks(work, rows)
    usable = [row for row in rows if any(samples_of(row, task) for task in tasks)]
    if not usable:
        raise NotThere(
            f"split {work.config.split!r} has no clip with a reference; set split=… or eval_task=…; "
            f"splits are {work.audio.splits}"
        )
    step = max(1, len(usable) // work.config.eval_clips) if work.config.eval_clips else 1
    return usable[::step][: work.config.eval_clips or None]


def _tasks(work: Workspace, rows: list[dict[str, Any]]) -> list[str]:
    asked = work.config.eval_task
    return [task.strip() for task in asked.split(",")] if asked else [_main_task(rows)]


def _main_task(rows: list[dict[str, Any]]) -> str:
    if any(row["text"] for row in rows):
        return "asr"
    labels = sorted({name for row in rows for name in row["labels"]})
    if labels:
        return f"label:{labels[0]}"
    return "caption"


def _clips(scores: Scores) -> int:
    return sum(result.all.n for result in scores.tasks.values())


def _note(scores: Scores, before: Scores | None) -> str:
    name, value, _ = main_metric(scores)
    return f"{name} {value:.1%}" + (f" (untrained {main_metric(before)[1]:.1%})" if before else "")
