"""Checkpoints of a stage: safetensors and a state file that is written last.

A checkpoint is complete when its `state.json` is there; a folder without one is unfinished work and is never read.
Only what was trained so far is kept, on top of weights that anybody can rebuild from the preset and the seed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra import storage

WEIGHTS, OPTIMISER, STATE = "weights.safetensors", "optimiser.safetensors", "state.json"
KEPT = 2


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


def save_checkpoint(
    url: str, step: int, model: nn.Module, trained: list[str], optimiser: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Publish `<url>/step-<step>/`, then forget all but the newest two."""
    folder = storage.join(url, f"step-{step:07d}")
    parameters = dict(model.named_parameters())
    save_tensors(storage.join(folder, WEIGHTS), {name: parameters[name] for name in trained})
    save_tensors(storage.join(folder, OPTIMISER), _moments(model, optimiser))
    storage.write_json(storage.join(folder, STATE), state | {"step": step})
    for old in _complete(url)[:-KEPT]:
        storage.remove_tree(storage.join(url, old))


def latest_checkpoint(url: str) -> str | None:
    """URL of the newest complete checkpoint, None if there is none."""
    complete = _complete(url)
    return storage.join(url, complete[-1]) if complete else None


def load_checkpoint(url: str, model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights and moments back; returns the state that was saved with them."""
    load_weights(storage.join(url, WEIGHTS), model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in load_tensors(storage.join(url, OPTIMISER)).items():
        kind, _, parameter = name.partition("/")
        optimiser.state[parameters[parameter]][kind] = value
    state: dict[str, Any] = storage.read_json(storage.join(url, STATE))
    return state


def load_weights(url: str, model: nn.Module) -> list[str]:
    """Copy saved parameters into a model; returns their names. Raises KeyError for a name the model lacks."""
    parameters = dict(model.named_parameters())
    saved = load_tensors(url)
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    return list(saved)


def _complete(url: str) -> list[str]:
    names = [name for name in storage.list_names(url) if name.startswith("step-")]
    return sorted(name for name in names if storage.exists(storage.join(url, name, STATE)))


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{kind}/{names[p]}": value for p, moments in optimiser.state.items() for kind, value in moments.items()}
