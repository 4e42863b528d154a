"""Evaluation: one process that answers with the untrained and with the trained model."""

from __future__ import annotations

from typing import Any

import torch

from components.batching.loader import feature_vector
from components.batching.measure import ReadAudio
from components.curriculum.examples import Examples
from components.curriculum.tasks import TaskSample, samples_of
from components.evaluation.answer import answer_all
from components.shards.index import read_rows
from components.training.weights import load_weights
from models.contract import SpeechLLM
from models.preset import Preset
from models.recipe import Decoding
from pipelines.workers.model import audio_of, trainable_model


def answer_clips(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of the untrained and of the trained model to the same clips, as records of hypotheses.

    Settings: arch, preset, seed, inputs, audio_root, weights (of the last stage), rows (of the index), task, threads,
    baseline (how many clips the untrained model answers at most, 0 = all).
    """
    torch.set_num_threads(settings["threads"])
    model, tokenizer = trainable_model(settings)
    recipe = Preset.model_validate(settings["preset"]).recipe
    read = audio_of(settings, recipe.hears[-1], model).read
    decoding = recipe.decoding
    examples = _examples(settings, decoding, model, read)
    samples = [(row, sample) for row in settings["rows"] for sample in _asked(row, settings["task"], examples)]
    prompts, seconds = [sample.prompt() for _, sample in samples], [row["seconds"] for row, _ in samples]
    audios = [[read(key) for key in sample.keys] for _, sample in samples]
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


def _asked(row: dict[str, Any], task: str, examples: Examples) -> list[TaskSample]:
    """The task's samples of a row, behind the examples that the decoding asks for."""
    return [s for made in samples_of(row, task) for s in samples_of(row, made.task, 1, examples.of(row, made.task))]


def _examples(settings: dict[str, Any], decoding: Decoding, model: SpeechLLM, read: ReadAudio) -> Examples:
    if not decoding.shots:
        return Examples()
    train = read_rows(settings["audio_root"]).where("split", "train")
    return Examples(train, decoding.shots, feature_vector(read) if decoding.nearest else None, model.several_clips)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced; 0 means all."""
    wanted = min(most or count, count)
    return [i * count // wanted for i in range(wanted)]
