"""Weights of a stage as one safetensors file: what was trained so far, on top of what preset and seed give."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra import storage


def save_tensors(url: str, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file in one atomic step."""
    with tempfile.TemporaryDirectory(dir=storage.scratch(url)) as folder:
        path = Path(folder) / "tensors.safetensors"
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
        storage.upload(path, url)


def load_tensors(url: str) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return load_file(storage.local_copy(url, Path(folder)))


def load_weights(url: str, model: nn.Module) -> list[str]:
    """Copy saved parameters into a model; returns their names. Raises KeyError for a name the model lacks."""
    parameters = dict(model.named_parameters())
    saved = load_tensors(url)
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    return list(saved)
