"""In which precision a device computes: bfloat16 where it has the instructions, float32 elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA cards and CPUs that multiply it in hardware.

    Without those instructions a CPU emulates bfloat16 about eighty times slower than float32 (measured on AVX2).
    """
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
