"""Evaluation: one process that answers with the untrained and with the trained model."""

from __future__ import annotations

from typing import Any

import torch

from components.curriculum.tasks import samples_of
from components.evaluation.answer import answer_all
from components.training.weights import load_weights
from models.recipe import Decoding
from pipelines.workers.model import CachedAudio, trainable_model


def answer_clips(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of the untrained and of the trained model to the same clips, as records of hypotheses.

    Settings: arch, preset, seed, inputs, weights (of the last stage), rows (of the index), task, decoding, threads,
    baseline (how many clips the untrained model answers at most, 0 = all).
    """
    torch.set_num_threads(settings["threads"])
    read = CachedAudio(settings["inputs"]).read
    model, tokenizer = trainable_model(settings)
    samples = [(row, sample) for row in settings["rows"] for sample in samples_of(row, settings["task"])]
    prompts, seconds = [sample.prompt() for _, sample in samples], [row["seconds"] for row, _ in samples]
    audios = [read(sample.key) for _, sample in samples]
    decoding = Decoding.model_validate(settings["decoding"])
    asked = _spread(len(samples), settings["baseline"])
    untrained = answer_all(
        model, tokenizer, [prompts[i] for i in asked], [audios[i] for i in asked], [seconds[i] for i in asked], decoding
    )
    before = dict(zip(asked, untrained, strict=True))
    load_weights(settings["weights"], model)
    after = answer_all(model, tokenizer, prompts, audios, seconds, decoding)
    return [
        {
            "key": sample.key,
            "task": sample.task,
            "split": row["split"],
            "language": row["language"],
            "speaker": row["speaker"],
            "reference": sample.reference,
            "hypothesis": now,
            "before": before.get(i),
            "seconds": row["seconds"],
        }
        for i, ((row, sample), now) in enumerate(zip(samples, after, strict=True))
    ]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced; 0 means all."""
    wanted = min(most or count, count)
    return [i * count // wanted for i in range(wanted)]
