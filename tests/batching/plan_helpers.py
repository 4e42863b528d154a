"""Samples and stages for the tests of planning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.batching.samples import Samples
from models.recipe import Stage


def make_samples(tokens: Sequence[int] | NDArray[Any], **given: Any) -> Samples:
    """Samples of these lengths; the rest is given or plain: one task, one data set, one shard, 10 tokens a second."""
    sizes = np.asarray(tokens, dtype=np.int32)
    zeros = np.zeros(len(sizes), dtype=np.int32)
    fields: dict[str, Any] = {
        "row": np.arange(len(sizes), dtype=np.int32),
        "task": zeros,
        "collection": zeros,
        "shard": zeros,
        "tokens": sizes,
        "labels": np.ones(len(sizes), dtype=np.int32),
        "seconds": sizes / 10,
        "audio": np.ones(len(sizes), dtype=np.bool_),
        "tasks": ("asr",),
        "collections": ("books",),
    }
    return Samples(**(fields | given))


def make_stage(**given: Any) -> Stage:
    return Stage(**({"name": "s", "train": ("lora",)} | given))


def lognormal(count: int, mean: float, sigma: float = 0.6, seed: int = 0) -> NDArray[np.int32]:
    """Lengths as corpora have them: many short, few long; between 8 and 600 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, 8, 600).astype(np.int32)


def real_lengths(shared_data: Path) -> NDArray[np.int32]:
    """Tokens of the real recordings and their texts, about as a model would see them, shuffled."""
    found = []
    for manifest in sorted(shared_data.glob("*/manifest.jsonl")):
        if manifest.parent.name != "bad":
            rows = [json.loads(line) for line in manifest.read_text().splitlines()]
            found += [int(12 * row.get("duration", 0) + 0.3 * len(row.get("text") or "") + 16) for row in rows]
    return np.random.default_rng(0).permutation(np.array(found, dtype=np.int32))


def rank_correlation(places: NDArray[np.int32]) -> float:
    """Spearman's, between the order before and after, as no two places are equal."""
    count = len(places)
    moved = (places - np.arange(count)).astype(float)
    return float(1 - 6 * (moved**2).sum() / (count * (count**2 - 1)))
