"""Learning rate over the steps of a stage."""

from __future__ import annotations

import math

from models.recipe import Optimiser


def learning_rate(optimiser: Optimiser, step: int, steps: int) -> float:
    """Rate at `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine to `final_lr`."""
    warmup = optimiser.warmup if optimiser.warmup >= 1 else optimiser.warmup * steps
    if step < warmup:
        return optimiser.lr * (step + 1) / (warmup + 1)
    if optimiser.schedule == "constant":
        return optimiser.lr
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    left = 1 - done if optimiser.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimiser.final_lr + (optimiser.lr - optimiser.final_lr) * left
