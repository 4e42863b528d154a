"""What the throughput benchmarks train: FunASR-LLM's `small` preset on a corpus of mixed lengths.

Lengths and texts are those of the real recordings beside this clone, all data sets as they are, or log-normal where
there are none. The sound itself is noise: what an encoder or a backbone costs depends on lengths alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.batching.loader import StageData, stage_data
from components.batching.plan import Plan
from components.training.precision import compute_dtype, store_frozen
from models.architectures import load
from models.contract import SpeechLLM
from models.preset import Preset
from models.pretrained import load_tokenizer
from models.recipe import Stage
from models.rendering import Audio

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RATE = 16_000
WORDS = ("light", "water", "kitchen", "seven", "the", "of", "morning", "turn", "river", "and", "a", "window")


@dataclass(frozen=True)
class System:
    """A model with its tokenizer, and the precision that the device multiplies in."""

    model: SpeechLLM
    tokenizer: Any
    dtype: torch.dtype

    def state(self, train: tuple[str, ...]) -> dict[str, Tensor]:
        """Copies of what the groups of `train` hold."""
        names = set(self.model.freeze(train))
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if n in names}

    def restore(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)
                parameters[name].grad = None


def build(change: Callable[[Preset], None] = lambda preset: None) -> System:
    """The `small` preset as training holds it: frozen matrices in the precision of the device's products."""
    architecture = load("funasr_llm")
    preset = architecture.preset("small")
    change(preset)
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    model = architecture.build(preset, tokenizer, seed=0)
    model.freeze(("connector", "lora"))
    dtype = compute_dtype(torch.device("cpu"))
    store_frozen(model, dtype, set())
    return System(model, tokenizer, dtype)


def recorded() -> list[tuple[float, str]]:
    """Seconds and text of every real recording that has a text; empty where there are no recordings."""
    found = []
    for manifest in sorted(SHARED_DATA.glob("*/manifest.jsonl")):
        for line in manifest.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row.get("text") or row.get("pseudo_text") or row.get("caption")
            if text and row.get("duration"):
                found.append((float(row["duration"]), str(text)))
    return found


def made_up(count: int, rng: np.random.Generator) -> list[tuple[float, str]]:
    """Log-normal seconds around 1.2, and about two words a second."""
    seconds = np.clip(np.exp(rng.standard_normal(count) * 0.8 + 0.2), 0.3, 20.0)
    return [(float(s), " ".join(rng.choice(WORDS, max(1, round(2 * s))).tolist())) for s in seconds]


def mixed_rows(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], str]:
    """`count` index rows drawn at random, and where their lengths come from."""
    rng = np.random.default_rng(seed)
    real = recorded()
    pairs = [real[i] for i in rng.choice(len(real), count, replace=False)] if real else made_up(count, rng)
    rows = [row_of(number, *pair) for number, pair in enumerate(pairs)]
    return rows, f"{len(real):,} real recordings of ../shared/data" if real else "a log-normal distribution"


def row_of(number: int, seconds: float, text: str) -> dict[str, Any]:
    return {
        "key": f"clip{number}",
        "seconds": seconds,
        "text": text,
        "labels": {},
        "translation": {},
        "caption": None,
        "conversations": None,
    }


def noise(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A waveform `(samples,)` at 16 kHz for each row."""
    random = torch.Generator().manual_seed(0)
    return {row["key"]: torch.randn(int(row["seconds"] * RATE), generator=random) * 0.1 for row in rows}


def cached(model: SpeechLLM, waveforms: dict[str, Tensor], at_a_time: int = 8) -> dict[str, Audio]:
    """What a feature cache holds of the clips: bfloat16 frames, encoded with clips of like length."""
    keys = sorted(waveforms, key=lambda key: len(waveforms[key]))
    found: dict[str, Audio] = {}
    for start in range(0, len(keys), at_a_time):
        part = keys[start : start + at_a_time]
        for key, audio in zip(part, model.listen([waveforms[k] for k in part]), strict=True):
            found[key] = Audio({role: frames.bfloat16() for role, frames in audio.features.items()})
    return found


def batches_of(
    size: int, stage: Stage, rows: list[dict[str, Any]], system: System, read: Callable[[str], Audio]
) -> StageData:
    """A stage whose batches are `size` neighbouring rows each, packed: the batches that another trainer gets as well.

    ValueError if a row gives no sample or cannot be aligned: the batches would not be the same.
    """
    data = stage_data(stage, rows, system.model, system.tokenizer, read, seed=0, layout="packed")
    if len(data.samples) != len(rows) or not (data.samples.labels > 0).all():
        raise ValueError(f"{len(rows)} rows gave {int((data.samples.labels > 0).sum())} usable samples")
    steps = len(rows) // size
    order = np.arange(steps * size, dtype=np.int32)
    starts = np.arange(steps + 1, dtype=np.int64) * size
    plan = Plan(order, starts, np.zeros(steps, dtype=np.int32), np.zeros(0, dtype=np.int32), "packed")
    return StageData(stage, rows, data.samples, plan, read, data.render, data.pad_id, data.examples)
