"""Tensors of every type, and checkpoints of them, for the tests of components/training/checkpoint.py."""

from __future__ import annotations

import torch
from torch import Tensor

from components.training.checkpoint import Checkpoints
from infra import storage


def sample(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(6, 4, generator=generator)
    return {
        "bf16": torch.randn(5, generator=generator).to(torch.bfloat16),
        "fp32": wide,
        "turned": wide.t(),
        "fp64": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "int64": torch.tensor(2**53 + 1 + seed),
        "step": torch.tensor(3.0 + seed),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def bits(value: Tensor) -> bytes:
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return left.keys() == right.keys() and all(bits(left[name]) == bits(right[name]) for name in left)


def saved(checkpoints: Checkpoints, *steps: int, scores: dict[int, float] | None = None) -> None:
    for step in steps:
        checkpoints.save(step, sample(step), {"step": step}, (scores or {}).get(step))
    checkpoints.wait()


def loads(url: str) -> int:
    """Step of the newest complete checkpoint, once it is seen to be whole; 0 without one."""
    checkpoints = Checkpoints(url)
    newest = checkpoints.latest()
    if newest is None:
        return 0
    filled = blank(sample())
    step: int = checkpoints.load(newest, filled)["step"]
    assert same(filled, sample(step))
    return step


def folders(url: str) -> list[str]:
    """Names of the folders that hold files; memory:// lists empty ones too."""
    return sorted({name.partition("/")[0] for name in storage.find(url)})


def file_of(folder: str) -> str:
    (name,) = [name for name in storage.list_names(folder) if name.endswith(".safetensors")]
    return storage.join(folder, name)
