"""Weights of an encoder as they are published: a checkpoint file that holds more than the encoder, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.encoders.loading import load_weights, read_json
from models.pretrained import resolve
from models.statefiles import read_state

SUFFIXES = (".pt", ".pth", ".bin")
NESTED = ("model",)  # where training scripts keep the tensors, beside the optimiser's


def read_published(reference: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Entries of config.json, tensors by name, and where they came from; a checkpoint file has no configuration.

    Raises FileNotFoundError if there is nothing and ValueError if a file is damaged or could run code.
    """
    path = Path(reference).expanduser()
    if path.suffix in SUFFIXES:
        return {}, read_state(path, NESTED), path
    folder = resolve(reference)
    return read_json(folder / "config.json"), load_weights(folder, ("",)), folder


def prefix_of(state: Mapping[str, Tensor], ending: str) -> str | None:
    """What stands before `ending` in the first name that ends so, such as `module.`; None if no name does."""
    return next((name.removesuffix(ending) for name in state if name.endswith(ending)), None)
