"""Tensors out of the files that others publish: safetensors, or PyTorch's own format without running what is in it."""

from __future__ import annotations

import json
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
# fairseq writes its arguments as a Namespace: a bag of values, without code of its own
PLAIN: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [Namespace]


def read_state(path: Path, nested: tuple[str, ...] = (), device: Literal["cpu", "meta"] = "cpu") -> dict[str, Tensor]:
    """Tensors by name of an official file, or of a folder with one or with shards and their index.

    `nested` leads to the tensors inside a pickled file. On the device "meta" only shapes are read. Values that are no
    tensors are left out. Raises FileNotFoundError or ValueError, naming the file and what to do.
    """
    state: dict[str, Tensor] = {}
    for file in state_files(path):
        found = _safetensors(file, device) if file.suffix == ".safetensors" else _pickled(file, nested, device)
        if both := sorted(state.keys() & found.keys()):
            raise ValueError(f"{file} holds {both[0]!r} again, which another file of {path} has; get the folder again")
        state |= found
    return state


def state_files(path: Path) -> list[Path]:
    """The files that hold the tensors: `path` itself, or those of a folder. FileNotFoundError if one is not there."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no {path}; download the official checkpoint and give its place")
    for name in INDEXES:
        if (path / name).is_file():
            return _shards(path / name)
    files = [path / name for name in SINGLE if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path} has none of {', '.join((*INDEXES, *SINGLE))}; give the file itself")
    return files[:1]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error}); get the folder again") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} names files outside its folder: {outside[0]!r}")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} names; get them too")
    return [index.parent / name for name in names]


def _safetensors(file: Path, device: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            if device == "meta":
                return {name: torch.empty(content.get_slice(name).get_shape(), device="meta") for name in names}
            return {name: content.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); get it again") from error


def _pickled(file: Path, nested: tuple[str, ...], device: str) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(PLAIN):
            mapped = zipfile.is_zipfile(file)  # the format before PyTorch 1.6 cannot be mapped into memory
            content = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for files that are none
        raise ValueError(_refused(file, str(error))) from error
    return _descend(content, nested, file)


def _refused(file: Path, reason: str) -> str:
    if named := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"{file} holds more than tensors and plain values ({named[1]}), and that could run code: it is not opened. "
            "Where you trust it, save its state dict alone with safetensors or torch.save, and import that"
        )
    why = named[0] if (named := re.search(r"Unsupported operand \d+", reason)) else reason.partition("\n")[0][:100]
    return f"{file} is no checkpoint of tensors and plain values, or is damaged ({why or 'cut short'}); get it again"


def _descend(content: Any, nested: tuple[str, ...], file: Path) -> dict[str, Tensor]:
    for key in nested:
        if _is_state(content):
            break
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{file} has no {key!r} with tensors, it holds {_held(content)}; is it the official file?")
        content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"{file} holds {_held(content)} where tensors should be; is it the official file?")
    return state


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _held(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join(repr(str(name)) for name in list(content)[:8]) or "nothing"
