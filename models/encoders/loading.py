"""Weights of an encoder out of a model folder, and the masks of a padded batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.encoders.base import EncoderSpec


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if the file is missing. Raises ValueError, naming the file, if it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); get the model folder again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; get the model folder again")
    return value


def load_weights(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of all safetensors files under the first prefix that occurs, without it, in float32.

    Raises FileNotFoundError if the folder has no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors; convert the weights, pickled ones are not read")
    names = [name for file in files for name in tensor_names(file)]
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in names)), "")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a dict
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = content.get_tensor(name).float()
    return found


def tensor_names(file: Path) -> list[str]:
    """Names in a safetensors file. Raises ValueError, naming the file, if it is damaged."""
    try:
        with safe_open(file, framework="pt") as content:
            return list(content.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); get the model folder again") from error


def fill(module: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Loads every parameter. Raises ValueError, naming the source, if names or shapes do not fit."""
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the encoder: {error}") from error


def check_layer(layer: int | None, layers: int) -> None:
    """Raises ValueError if the kept layer is not one of the encoder's."""
    if layer is not None and not 1 <= layer <= layers:
        raise ValueError(f"layer must lie between 1 and {layers}, the encoder's layers, or be empty; got {layer}")


def check_layers(spec: EncoderSpec, layers: int) -> None:
    """Raises ValueError if a hidden layer that is kept, one or several, is not one of the encoder's."""
    check_layer(spec.layer, layers)
    if spec.layers and spec.layers[-1] > layers:
        raise ValueError(f"layers must lie between 0 and {layers}, the encoder's layers; got {spec.layers}")


def valid_mask(counts: Tensor, size: int) -> Tensor:
    """True where a row is valid, `(batch,)` → `(batch, size)`."""
    return torch.arange(size, device=counts.device)[None] < counts[:, None]


def attention_bias(valid: Tensor) -> Tensor:
    """0 for valid keys and the smallest float for others, `(batch, size)` → `(batch, 1, 1, size)`."""
    bias = torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, torch.finfo(torch.float32).min)
    return bias[:, None, None]
