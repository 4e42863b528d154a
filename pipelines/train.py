"""Stage 3: the recipe's training stages on Ray; each ends as an artefact that the next one starts from."""

from __future__ import annotations

import contextvars
import threading
import time
from typing import Any

from prefect import flow, task

from components.registry.records import INPUTS, inputs
from components.schema import StageReport
from infra import storage
from pipelines import artifacts, remote, retrying
from pipelines.config import RunConfig
from pipelines.jobs import run_stage
from pipelines.locate import Workspace
from pipelines.progress import Work
from pipelines.slots import training_slot
from pipelines.workers.train import training_loop
from pipelines.workspace import workspace


@flow(name="train", description="The recipe's stages, in order")
def train(config: RunConfig) -> list[StageReport]:
    """Train every stage that has not been trained with these settings, data and predecessors."""
    artifacts.show_ray(config)
    reports = run_stage("train", config, lambda: train_stages(workspace(config)))
    artifacts.show_training(workspace(config), reports)
    return reports


@task(name="train stages", **retrying.TRAIN)
def train_stages(work: Workspace) -> list[StageReport]:
    began = time.monotonic()
    before = [_manifest(url) for _, url in work.stages]
    started = {url for _, url in work.stages if storage.list_names(storage.join(url, "checkpoints"))}
    if not all(before):
        with training_slot():
            _fit(work)
    reports = []
    for (stage, url), old in zip(work.stages, before, strict=True):
        made = _manifest(url)
        if made is None:
            raise RuntimeError(
                f"stage {stage.name!r} ended without its manifest at {url}; the log of Ray has the reason"
            )
        state = "up to date" if old else "resumed" if url in started else "done"
        steps = made["steps"]
        note = (
            f"{made['parameters']:,} parameters, {made['samples']:,} samples"
            if steps
            else "skipped: no clip has what its tasks need"
        )
        if made["left_out"]:
            note += f", {made['left_out']} too long"
        reports.append(
            StageReport(
                stage=f"train {stage.name}",
                state=state,
                done=0 if old else steps,
                reused=steps if old else 0,
                unit="steps",
                seconds=0.0 if old else made["seconds"],
                note=note,
                url=url,
            )
        )
    spent = sum(report.seconds for report in reports)
    if not all(before):  # starting workers and loading weights is part of the first stage that ran
        first = before.index(None)
        overhead = time.monotonic() - began - spent
        reports[first] = reports[first].model_copy(update={"seconds": reports[first].seconds + overhead})
    return reports


def training_settings(work: Workspace) -> dict[str, Any]:
    """What training workers are told; asks for the features, so a missing cache is said before workers start."""
    stages = work.stages
    return {
        "arch": work.config.arch,
        "preset": work.preset.model_dump(mode="json"),
        "seed": work.preset.recipe.seed + work.config.seed,
        "inputs": work.model_inputs,
        "audio_root": work.audio_root,
        "progress": storage.join(stages[-1][1], "progress"),
        "compute": work.config.compute.model_dump(mode="json"),
        "fits": work.fits,
        "threads": work.config.cores_each(),
        "workers": work.config.workers,
        "tensorboard": storage.join(stages[-1][1], "tensorboard"),
        "stages": [(stage.model_dump(mode="json"), url) for stage, url in stages],
    }


def note_inputs(work: Workspace) -> None:
    """Write what each stage is made from before it begins: also one that was killed can be traced."""
    before: list[str] = []
    for _, url in work.stages:
        record = storage.join(url, INPUTS)
        if not storage.exists(record):
            storage.write_json(record, inputs([work.audio], list(work.features.values()), before))
        before.append(url)


def _fit(work: Workspace) -> None:
    settings = training_settings(work)
    note_inputs(work)
    progress = settings["progress"]
    over = threading.Event()
    watch = contextvars.copy_context().run  # else the thread would not know which flow run it shows progress of
    watcher = threading.Thread(target=watch, args=(_watch, storage.join(progress, "progress.json"), over), daemon=True)
    watcher.start()
    try:
        remote.train(work.config, training_loop, settings, progress)
    finally:
        over.set()
        watcher.join(5)
        storage.remove_tree(progress)


def _watch(url: str, over: threading.Event) -> None:
    """Show what the workers write about once a second."""
    stage: Any = None
    shown: Work | None = None
    while not over.wait(1.0):
        if not storage.exists(url):
            continue
        now = storage.read_json(url)
        if now["stage"] != stage:
            if shown is not None:
                shown.__exit__(None, None, None)
            stage, shown = now["stage"], Work(now["stage"], now["steps"], "steps").__enter__()
        if shown is not None:
            shown.to(now["step"] + 1, _pace(now))
    if shown is not None:
        shown.__exit__(None, None, None)


def _pace(now: dict[str, Any]) -> str:
    """What a person watches: loss, speed, and where time goes."""
    loss = "not finite" if now["loss"] is None else f"{now['loss']:.3f}"
    parts = [f"loss {loss}", f"{now['tokens_per_second']:,.0f} tokens/s", f"{now['samples_per_second']:.1f} samples/s"]
    parts += [f"waits {now['data_wait']:.1%}", f"padding {now['padding']:.1%}"]
    if "mfu" in now:
        parts.append(f"MFU {now['mfu']:.0%}")
    if "gpu_bytes" in now:
        parts.append(f"{now['gpu_bytes'] / 1e9:.1f} GB")
    return ", ".join(parts)


def _manifest(url: str) -> dict[str, Any] | None:
    manifest = storage.join(url, "manifest.json")
    return storage.read_json(manifest) if storage.exists(manifest) else None
