"""Training workers: all pending stages of a recipe, one after the other."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

from components.batching.loader import stage_data
from components.shards.index import read_rows
from components.training.checkpoint import load_weights
from components.training.loop import StageLoop, train_stage
from infra import storage
from models.recipe import Stage
from pipelines.workers.model import audio_reader, trainable_model

PROGRESS_SECONDS = 1.0


class RayScheduler:
    """Ray Train as the training loop sees it; rank 0 writes `progress.json` about once a second."""

    def __init__(self, url: str) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.url, self.last = url, 0.0

    def report(self, metrics: dict[str, Any]) -> None:
        if self.rank == 0 and time.monotonic() - self.last > PROGRESS_SECONDS:
            storage.write_json(storage.join(self.url, "progress.json"), metrics)
            self.last = time.monotonic()


def training_loop(settings: dict[str, Any]) -> None:
    """All pending stages, one after the other, on one of Ray Train's workers (or alone).

    Settings: arch, preset, seed, inputs (role -> feature root), audio_root, stages (stage, url, number), progress.
    """
    torch.set_num_threads(settings["threads"])
    rows = [row for row in read_rows(settings["audio_root"]) if row["split"] == "train"]
    read = audio_reader(settings["inputs"])
    model, tokenizer = trainable_model(settings)
    scheduler = RayScheduler(settings["progress"])
    trained: list[str] = []
    for number, (declared, url) in enumerate(settings["stages"]):
        weights, manifest = storage.join(url, "weights.safetensors"), storage.join(url, "manifest.json")
        if storage.exists(manifest):
            trained = load_weights(weights, model) if storage.exists(weights) else trained
            continue
        stage = Stage.model_validate(declared)
        data = stage_data(stage, rows, model, tokenizer, read, settings["seed"] + number)
        began = time.monotonic()
        if len(data.plan):
            trained = train_stage(
                StageLoop(stage, data, model, tokenizer, url, settings["seed"] + number, scheduler), trained
            )
        elif trained and scheduler.rank == 0:  # nothing to learn from: the stage hands on what it was given
            _hand_on(settings["stages"][number - 1][1], url)
        if scheduler.rank == 0:
            learning = {name: p.numel() for name, p in model.named_parameters() if name in set(trained)}
            storage.write_json(
                manifest,
                {
                    "stage": declared,
                    "steps": len(data.plan),
                    "samples": len(data.samples),
                    "left_out": len(data.plan.left_out),
                    "parameters": sum(learning.values()),
                    "seconds": time.monotonic() - began,
                    "world": scheduler.world,
                },
            )
            storage.remove_tree(storage.join(url, "checkpoints"))
        if scheduler.world > 1:
            dist.barrier()


def _hand_on(before: str, url: str) -> None:
    storage.write_bytes(
        storage.join(url, "weights.safetensors"), storage.read_bytes(storage.join(before, "weights.safetensors"))
    )


def read_metrics(url: str) -> list[dict[str, Any]]:
    """The metric lines of a stage, empty for one that learnt nothing."""
    metrics = storage.join(url, "metrics.jsonl")
    return [json.loads(line) for line in storage.read_text(metrics).splitlines()] if storage.exists(metrics) else []
