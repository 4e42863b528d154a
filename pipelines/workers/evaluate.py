"""Evaluation: one process that answers with the untrained and with the trained model."""

from __future__ import annotations

from typing import Any

import torch

from components.batching.loader import examples_among
from components.curriculum.tasks import TaskSample
from components.evaluation.answer import answer_all
from components.evaluation.options import choose, options_of
from components.shards.index import Rows, read_rows
from components.training.weights import load_weights
from models.contract import SpeechLLM
from models.preset import Preset
from models.rendering import Audio
from pipelines.workers.model import StageAudio, trainable_model


def answer_clips(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers of the untrained and of the trained model to the same clips, as records of hypotheses.

    Settings: arch, preset, seed, inputs, audio_root, weights (of the last stage), rows (of the index), tasks, threads,
    baseline (how many clips the untrained model answers at most, 0 = all), options (compare the labels' likelihoods).
    """
    torch.set_num_threads(settings["threads"])
    model, tokenizer = trainable_model(settings)
    rows = read_rows(settings["audio_root"])
    train = rows.where("split", "train")
    read = StageAudio(settings, rows).of(-1, model).read
    decoding = Preset.model_validate(settings["preset"]).recipe.decoding
    examples = examples_among(train, decoding, model, read)
    samples = [(row, sample) for row in settings["rows"] for sample in examples.samples(row, settings["tasks"])]
    prompts, seconds = [sample.prompt() for _, sample in samples], [row["seconds"] for row, _ in samples]
    audios = [[read(key) for key in sample.keys] for _, sample in samples]
    asked = _spread(len(samples), settings["baseline"])
    untrained = answer_all(
        model, tokenizer, [prompts[i] for i in asked], [audios[i] for i in asked], [seconds[i] for i in asked], decoding
    )
    before = dict(zip(asked, untrained, strict=True))
    load_weights(settings["weights"], model)
    after = answer_all(model, tokenizer, prompts, audios, seconds, decoding)
    chosen = _choices(train, model, tokenizer, samples, audios) if settings["options"] else {}
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
            "choice": chosen.get(i),
            "seconds": row["seconds"],
        }
        for i, ((row, sample), now) in enumerate(zip(samples, after, strict=True))
    ]


def _choices(
    train: Rows,
    model: SpeechLLM,
    tokenizer: Any,
    samples: list[tuple[dict[str, Any], TaskSample]],
    audios: list[list[Audio]],
) -> dict[int, str]:
    """Number of a sample -> the likeliest of its task's labels, which are those of the train split."""
    found: dict[int, str] = {}
    for task in dict.fromkeys(sample.task for _, sample in samples):
        options = options_of(train, task)
        asked = [i for i, (_, sample) in enumerate(samples) if sample.task == task and options]
        prompts, clips = [samples[i][1].prompt() for i in asked], [audios[i] for i in asked]
        found |= dict(zip(asked, choose(model, tokenizer, prompts, clips, options) if asked else [], strict=True))
    return found


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spaced; 0 means all."""
    wanted = min(most or count, count)
    return [i * count // wanted for i in range(wanted)]
