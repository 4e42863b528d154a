"""In which precision a device computes: bfloat16 where it has the instructions, float32 elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch
from torch import nn

from models.contract import SpeechLLM

MATMUL_SECONDS = 0.2  # how long a device's rate is measured


def compute_dtype(device: torch.device, asked: Literal["auto", "float32", "bfloat16"] = "auto") -> torch.dtype:
    """bfloat16 on CUDA cards and CPUs that multiply it in hardware, unless something else is asked for.

    Without those instructions a CPU emulates bfloat16 about eighty times slower than float32 (measured on AVX2).
    """
    if asked != "auto":
        return getattr(torch, asked)  # type: ignore[no-any-return]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    flags = {"avx512_bf16", "amx_bf16"}
    try:
        with open("/proc/cpuinfo") as file:
            has = next((flags & set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return torch.float32
    return torch.bfloat16 if has else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def store_frozen(model: SpeechLLM, dtype: torch.dtype, trained_later: set[str]) -> None:
    """Keep the backbone's frozen matrices in the precision in which autocast multiplies them.

    The products are the same to the bit; what goes is the cast of every matrix in every pass, and half of the memory.
    Matrices that learn now or later (`trained_later`, parameter names) stay in float32.
    """
    if dtype == torch.float32:
        return
    embeddings = {id(p) for p in (model.llm.get_input_embeddings(), model.llm.get_output_embeddings())}
    for name, module in model.llm.named_modules():
        if not isinstance(module, nn.Linear) or id(module) in embeddings or ".lora_" in name:
            continue
        if not module.weight.requires_grad and f"llm.{name}.weight" not in trained_later:
            module.weight.data = module.weight.data.to(dtype)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that this device reaches in a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    done, began = 0, _now(device)
    while (spent := _now(device) - began) < MATMUL_SECONDS or done < 2:
        left @ right
        done += 1
    return done * 2 * size**3 / spent


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
