"""When memory runs out in a step: the micro-batch is halved, the global batch stays what it is."""

from __future__ import annotations

import gc
import logging

import torch

from infra import storage

SMALLEST = 16  # tokens: a micro-batch that does not fit at this size never will
RECORD = "memory.json"


class OutOfMemory(RuntimeError):
    """One sample alone does not fit, or the ranks must start again with smaller micro-batches."""


class MicroBatch:
    """How many tokens are computed at a time; remembered beside the stage, so that a restart begins with it."""

    def __init__(self, url: str, tokens: int | None) -> None:
        self.url = storage.join(url, RECORD)
        if storage.exists(self.url):
            noted = int(storage.read_json(self.url)["micro_tokens"])
            tokens = noted if tokens is None else min(tokens, noted)
        self.tokens = tokens

    def halve(self, computed: int, step: int, record: bool = True) -> None:
        """After `computed` tokens at a time did not fit. Raises OutOfMemory if there is nothing left to halve."""
        smaller = (min(computed, self.tokens) if self.tokens else computed) // 2
        if smaller < SMALLEST:
            raise OutOfMemory(
                f"step {step}: {computed} tokens do not fit into memory; set a smaller max_tokens for the stage, "
                "compute.activation_checkpointing=true, or use compute.parallel=fsdp on more workers"
            )
        self.tokens = smaller
        logging.getLogger(__name__).warning(
            "step %d: out of memory with %d tokens at a time; going on with %d, the global batch stays the same",
            *(step, computed, smaller),
        )
        if record:
            storage.write_json(self.url, {"micro_tokens": smaller})


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error and the one of PyTorch's allocator on CPU, which has no class of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))


def release() -> None:
    """Give back what a failed step held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
