"""One optimiser step over a global batch, wherever its parts are computed.

The loss is a mean over all labels of the global batch: each micro-batch adds its summed loss divided by their number,
which the plan knows. So one worker with four micro-batches, two with two and four with one learn the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from components.training.parallel import add_up, synchronise
from components.training.precision import autocast
from models.batch import Batch

StepLoss = Callable[[Batch], tuple[Tensor, Tensor]]  # summed loss and number of labels


@dataclass(frozen=True)
class Stepper:
    """What the steps of a stage share."""

    module: nn.Module
    loss: StepLoss
    optimiser: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    clip: float  # 0 = never
    rank: int
    world: int


@dataclass(frozen=True)
class Outcome:
    """What came of a step, over all ranks."""

    loss: float  # mean over the labels
    norm: float  # of the gradient, before clipping
    labels: int
    tokens: int
    positions: int  # tokens and padding

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def run_step(stepper: Stepper, batches: Sequence[Batch], labels: int | None, seed: int) -> Outcome:
    """Gradients of a global batch with `labels` labels, and one optimiser step if they are finite.

    A step whose loss or gradient is not finite leaves parameters and optimiser as they were.
    `labels` is what the plan says; RuntimeError if the batches hold others. None: what the batches hold is right.
    """
    optimiser = stepper.optimiser
    optimiser.zero_grad(set_to_none=True)
    summed = torch.zeros((), dtype=torch.float64, device=stepper.device)
    found = tokens = positions = 0
    expected = max(1, labels or sum(batch.label_tokens for batch in batches))
    for number, batch in enumerate(batches):
        torch.manual_seed(seed * 8192 + stepper.rank * 512 + number % 512)  # dropout needs no saved state to resume
        synchronise(stepper.module, last=number == len(batches) - 1)
        loss, count = batch_loss(stepper, batch)
        (loss * (stepper.world / expected)).backward()  # DDP and FSDP average over ranks
        summed += loss.detach().double()
        found += count
        if count:  # else it is there for the exchange alone, and counted where it was not masked
            tokens, positions = tokens + batch.tokens, positions + batch.ids.numel()
    total, found_all, tokens_all, positions_all = add_up(
        [float(summed), float(found), float(tokens), float(positions)], stepper.device
    )
    if labels is not None and int(found_all) != labels:
        raise RuntimeError(
            f"the batch has {int(found_all)} labels where the plan has {labels}: the stage's plan belongs to other "
            "data or another tokenizer; remove the stage's folder and train again"
        )
    outcome = Outcome(total / expected, gradient_norm(stepper), int(found_all), int(tokens_all), int(positions_all))
    if outcome.finite:
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return outcome


def batch_loss(stepper: Stepper, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss of a batch and its number of labels; 0 for a batch whose labels are all masked."""
    with autocast(stepper.device, stepper.dtype):
        loss, count = stepper.loss(batch.to(stepper.device))
    return (loss if int(count) else loss * 0.0), int(count)  # CTC of no labels is that of blanks alone


def gradient_norm(stepper: Stepper) -> float:
    """Norm of the whole gradient; clips it in passing."""
    learning = [p for group in stepper.optimiser.param_groups for p in group["params"]]
    norm: Any = nn.utils.clip_grad_norm_(learning, stepper.clip or float("inf"))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def step_seed(seed: int, step: int) -> int:
    """A seed for each step of a stage, spread over the 50 bits that leave room for ranks and micro-batches."""
    return ((seed * 0x9E3779B1 + step * 0x85EBCA77) ^ (step << 17)) % (1 << 50)
