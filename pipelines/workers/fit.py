"""Memory fits: every stage of a recipe probed in one process on the device that will train it."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from components.batching.loader import stage_data
from components.shards.index import read_rows
from components.training.compute import Compute
from components.training.fit import Fit, fit_stage, keep_fit
from components.training.loop import Alone, StageLoop, make_stepper
from models.recipe import Stage
from pipelines.workers.model import StageAudio, on_device, stage_fit_key, trainable_model

PROBED = 512  # clips that are measured: the longest of them stand for the longest of all


def probe_stages(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage name -> fit, kept in the lake. Settings: those of training, and `only` (a stage's name or None)."""
    torch.set_num_threads(settings["threads"])
    every = read_rows(settings["audio_root"])
    rows = every.where("split", "train")
    longest = np.argsort(-rows.table["seconds"].to_numpy(), kind="stable")[:PROBED]
    chosen = [rows[int(i)] for i in longest]
    audio = StageAudio(settings, every)
    found: dict[str, dict[str, Any]] = {}
    for number, (declared, _) in enumerate(settings["stages"]):
        stage = Stage.model_validate(declared)
        if settings["only"] not in (None, stage.name):
            continue
        model, tokenizer = on_device(trainable_model(settings))
        model.freeze(stage.train)
        read = audio.of(number, model).read
        data = stage_data(stage, chosen, model, tokenizer, read, settings["seed"] + number)
        if not (data.samples.labels > 0).any():
            continue
        model.train()
        with tempfile.TemporaryDirectory() as nowhere:
            loop = StageLoop(
                stage, data, model, tokenizer, nowhere, 0, Alone(), Compute.model_validate(settings["compute"])
            )
            fit: Fit = fit_stage(data, make_stepper(loop), stage.batch_tokens)
        keep_fit(settings["fits"], stage_fit_key(settings, stage), fit)
        found[stage.name] = fit.model_dump(mode="json")
    return found
