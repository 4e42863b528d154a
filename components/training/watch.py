"""What a person watches while a stage trains: speed, waiting for data, memory and how busy the device is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from components.training.parallel import memory_bytes
from components.training.precision import matmul_rate
from components.training.step import Outcome
from models.contract import SpeechLLM
from models.recipe import Stage

T = TypeVar("T")


class Watch:
    """Times the steps of a stage."""

    def __init__(self, model: SpeechLLM, stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.flops = flops_per_token(model) if stage.loss == "lm" else None
        self.peak = matmul_rate(device, dtype) if self.flops else None
        self.began = self.loaded = time.monotonic()

    def waiting(self, steps: Iterator[T]) -> Iterator[T]:
        """The same steps; notes when each was asked for and when its data were there."""
        while True:
            self.began = time.monotonic()
            try:
                item = next(steps)
            except StopIteration:
                return
            self.loaded = time.monotonic()
            yield item

    def step_seconds(self) -> float:
        """Seconds since the data of this step were asked for."""
        return time.monotonic() - self.began

    def measured(self, outcome: Outcome, samples: int) -> dict[str, Any]:
        """tokens and samples a second over all ranks, share of the time spent waiting for data, and the share of the
        device's own matrix-product rate that the model's useful operations reach (MFU)."""
        seconds = max(1e-9, self.step_seconds())
        line = {
            "tokens_per_second": outcome.tokens / seconds,
            "samples_per_second": samples / seconds,
            "data_wait": (self.loaded - self.began) / seconds,
        }
        if self.flops and self.peak:
            workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            line["mfu"] = self.flops * outcome.tokens / seconds / self.peak / workers
        return line | memory_bytes(self.device)


def flops_per_token(model: SpeechLLM) -> float:
    """Operations of the backbone for a token: 2 a parameter forward, 2 back through it, 2 more where it learns.

    Attention's own products and logits are left out, so the share of the peak that follows is a lower bound.
    """
    outside = {id(p) for p in model.llm.get_input_embeddings().parameters()}
    head = model.llm.get_output_embeddings()
    outside |= {id(p) for p in head.parameters()} if head is not None else set()
    inside = [p for p in model.llm.parameters() if id(p) not in outside]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in inside))
