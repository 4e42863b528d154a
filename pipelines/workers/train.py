"""Training workers: all pending stages of a recipe, one after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from components.batching.stage_plan import chosen_layout, held_out_data, open_plan, publish_plan
from components.shards.index import Rows, read_rows
from components.training.compute import Compute
from components.training.history import SEGMENTS
from components.training.loop import StageLoop, train_stage
from components.training.parallel import uses_fsdp
from components.training.precision import compute_dtype, store_frozen
from components.training.weights import load_weights
from infra import storage
from models.contract import SpeechLLM
from models.recipe import Stage
from pipelines.workers.model import StageAudio, on_device, stage_fit, trainable_model

PROGRESS_SECONDS = 1.0
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"


class RayScheduler:
    """Ray Train as the training loop sees it; rank 0 writes `progress.json` about once a second."""

    def __init__(self, url: str, tensorboard: str | None) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.url, self.last = url, 0.0
        self.events = _event_writer(tensorboard) if tensorboard and self.rank == 0 else None

    def report(self, metrics: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        if self.events is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float) and name != "step":
                    self.events.add_scalar(f"{metrics['stage']}/{name}", value, metrics["step"])
        if time.monotonic() - self.last > PROGRESS_SECONDS:
            storage.write_json(storage.join(self.url, "progress.json"), metrics)
            self.last = time.monotonic()


@dataclass
class Worker:
    """What the stages of one worker share."""

    settings: dict[str, Any]
    scheduler: RayScheduler
    compute: Compute
    rows: Rows
    stages: list[tuple[Stage, str]]
    audio: StageAudio

    def seed(self, number: int) -> int:
        return int(self.settings["seed"]) + number


def training_loop(settings: dict[str, Any]) -> None:
    """All pending stages, one after the other, on one of Ray Train's workers (or alone).

    Settings: arch, preset, seed, inputs (role -> feature root), audio_root, stages (stage, url), compute,
    fits (folder of memory fits), progress, tensorboard, threads, workers.
    """
    torch.set_num_threads(settings["threads"])
    compute = Compute.model_validate(settings["compute"])
    tensorboard = settings["tensorboard"] if compute.tensorboard else None
    rows = read_rows(settings["audio_root"])
    worker = Worker(
        settings,
        RayScheduler(settings["progress"], tensorboard),
        compute,
        rows,
        [(Stage.model_validate(stage), url) for stage, url in settings["stages"]],
        StageAudio(settings, rows),
    )
    model, tokenizer = on_device(trainable_model(settings))
    trained: list[str] = []
    for number, (_, url) in enumerate(worker.stages):
        weights = storage.join(url, WEIGHTS)
        if storage.exists(storage.join(url, MANIFEST)):
            trained = load_weights(weights, model) if storage.exists(weights) else trained
            continue
        if uses_fsdp(compute, worker.scheduler.world) and number and trained:  # its parameters are shards by now
            model, tokenizer = on_device(trainable_model(settings))
            load_weights(storage.join(worker.stages[number - 1][1], WEIGHTS), model)
        trained = _train(worker, number, model, tokenizer, trained)


def _train(worker: Worker, number: int, model: SpeechLLM, tokenizer: Any, trained: list[str]) -> list[str]:
    """Plan and train one stage, and publish its manifest."""
    stage, url = worker.stages[number]
    began = time.monotonic()
    train = worker.rows.where("split", "train")
    fit = stage_fit(worker.settings, stage)
    layout = chosen_layout(stage, model, fit.layout if fit else None)
    audio = worker.audio.of(number, model)
    if worker.scheduler.rank == 0:
        publish_plan(url, stage, train, model, tokenizer, audio.measure, worker.seed(number), layout, audio.read)
    _wait_for_all(worker)
    data = open_plan(url, stage, train, model, tokenizer, audio.read)
    if len(data.plan):
        _store_frozen(worker, number, model)
        fitted = fit.micro_tokens if fit else 0
        compute = worker.compute.model_copy(update={"micro_tokens": worker.compute.micro_tokens or fitted})
        dev = worker.rows.where("split", "dev")
        held_out = held_out_data(stage, dev, model, tokenizer, audio.read, layout) if stage.patience else None
        loop = StageLoop(stage, data, model, tokenizer, url, worker.seed(number), worker.scheduler, compute, held_out)
        trained = train_stage(loop, trained)
    elif trained and worker.scheduler.rank == 0:  # nothing to learn from: the stage hands on what it was given
        before = storage.read_bytes(storage.join(worker.stages[number - 1][1], WEIGHTS))
        storage.write_bytes(storage.join(url, WEIGHTS), before)
    if worker.scheduler.rank == 0:
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        manifest = {
            "stage": stage.model_dump(mode="json"),
            "steps": len(data.plan),
            "samples": len(data.samples),
            "left_out": len(data.plan.left_out),
            "parameters": sum(sizes[name] for name in trained),
            "seconds": time.monotonic() - began,
            "world": worker.scheduler.world,
            "compute": worker.compute.model_dump(mode="json"),
        }
        storage.write_json(storage.join(url, MANIFEST), manifest)
        for working in ("checkpoints", SEGMENTS):
            storage.remove_tree(storage.join(url, working))
    _wait_for_all(worker)
    return trained


def _store_frozen(worker: Worker, number: int, model: SpeechLLM) -> None:
    """Halve the memory of what no stage from here on trains."""
    later = {name for stage, _ in worker.stages[number:] for name in model.trained_by(stage.train)}
    device = next(model.parameters()).device
    model.freeze(worker.stages[number][0].train)
    store_frozen(model, compute_dtype(device, worker.compute.precision), later)


def _wait_for_all(worker: Worker) -> None:
    if worker.scheduler.world > 1:
        dist.barrier()


def _event_writer(url: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("compute.tensorboard needs the package tensorboard: pip install tensorboard") from error
    folder = storage.local_path(url)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(folder))
