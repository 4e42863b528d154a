"""A rank's shard of a checkpoint as a safetensors file, in the layout of `torch.distributed.checkpoint`'s HuggingFace
storage: offsets in the metadata, so that any other number of ranks can read it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader, Metadata
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, DTYPE_MAP, SAVED_OFFSETS_KEY, _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from infra import storage
from infra.stores import shown

TYPES = DTYPE_MAP | {"BOOL": torch.bool}  # as safetensors writes them


class Damaged(ValueError):
    """The bytes of a checkpoint are not those that were written."""


@dataclass(frozen=True)
class Part:
    """What a rank writes of a tensor, and where in the whole tensor that begins."""

    tensor: Tensor
    offsets: tuple[int, ...]


def own_part(tensor: Tensor, index: int, rank: int, world: int) -> Part | None:
    """What this rank writes of the `index`-th tensor, None for nothing: each element is written once."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, (0,) * tensor.dim()) if index % world == rank else None
    place, local = tensor.device_mesh.get_coordinate(), tensor.to_local()
    if place is None or (local.numel() == 0 and tensor.numel() > 0):
        return None
    if any(at for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate()):
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return Part(local, tuple(chunk.offsets))


def write_shard(url: str, parts: dict[str, Part]) -> dict[str, Any]:
    """Write a rank's safetensors file; its entry in the marker. A second try begins with the tensors again."""
    with tempfile.TemporaryDirectory(dir=storage.scratch(url)) as scratch:
        path = Path(scratch) / url.rpartition("/")[2]
        offsets = {name: {SAVED_OFFSETS_KEY: part.offsets} for name, part in parts.items()}
        metadata = {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)}
        try:
            save_file({name: part.tensor for name, part in parts.items()}, path, metadata)
        except SafetensorError as error:  # it hides the operating system's number in its text
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else ValueError(error) from error
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            entry = {"name": path.name, "size": path.stat().st_size, "header": header}
            entry["header_sha256"] = hashlib.sha256(file.read(header)).hexdigest()
            file.seek(0)
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        storage.upload(path, url)
        return entry


def _layout(folder: str, files: list[dict[str, Any]]) -> Metadata:
    """Which file holds which part of which tensor, from the files' headers."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _HFStorageInfo] = {}
    for file in files:
        url = storage.join(folder, file["name"])
        data = storage.read_range(url, 0, file["header"])
        if hashlib.sha256(data).hexdigest() != file["header_sha256"]:
            raise _damaged(url)
        header = json.loads(data[8:])
        offsets = json.loads(header.pop("__metadata__")[CUSTOM_METADATA_KEY])
        for name, entry in header.items():
            begin, shape = torch.Size(offsets[name][SAVED_OFFSETS_KEY]), torch.Size(entry["shape"])
            dtype = TYPES[entry["dtype"]]
            known = tensors.setdefault(name, TensorStorageMetadata(TensorProperties(dtype), shape, []))
            known.chunks.append(ChunkStorageMetadata(begin, shape))
            known.size = torch.Size(max(n, b + s) for n, b, s in zip(known.size, begin, shape, strict=True))
            places[MetadataIndex(name, begin)] = _HFStorageInfo(file["name"], shape, dtype)
    return Metadata(tensors, storage_data=places)  # type: ignore[arg-type]


def _check_fit(folder: str, saved: Metadata, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        there = saved.state_dict_metadata.get(name)
        if not isinstance(there, TensorStorageMetadata):
            raise ValueError(f"{shown(folder)} has no {name!r}: it is of another stage or model, remove it")
        if (there.size, there.properties.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{shown(folder)}: {name!r} is {there.properties.dtype} {tuple(there.size)} there and {tensor.dtype} "
                f"{tuple(tensor.shape)} here: it is of another model, remove it"
            )
        if sum(chunk.sizes.numel() for chunk in there.chunks) != there.size.numel():
            raise Damaged(f"{shown(folder)}: parts of {name!r} are missing: remove it and take the checkpoint before")


def prepared(folder: str, files: list[dict[str, Any]], tensors: dict[str, Tensor], scratch: Path) -> Callable[[], Any]:
    """Fetch and check the files that this rank needs; returns what reads them into the tensors."""
    saved = _layout(folder, files)
    _check_fit(folder, saved, tensors)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), saved, is_coordinator=True)
    plan = planner.create_local_plan()
    needed = {saved.storage_data[item.storage_index].relative_path for item in plan.items}
    paths = {file["name"]: str(_fetched(folder, file, scratch)) for file in files if file["name"] in needed}
    reader = HuggingFaceStorageReader(str(scratch))
    for place in saved.storage_data.values():
        place.relative_path = paths.get(place.relative_path, place.relative_path)
    reader.set_up_storage_reader(saved, is_coordinator=True)
    return lambda: reader.read_data(plan, planner)


def _fetched(folder: str, file: dict[str, Any], scratch: Path) -> Path:
    url = storage.join(folder, file["name"])
    path = storage.local_copy(url, scratch)
    with open(path, "rb") as opened:
        if path.stat().st_size != file["size"] or hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
            raise _damaged(url)
    return path


def _damaged(url: str) -> Damaged:
    folder = url.rpartition("/")[0]
    return Damaged(f"{shown(url)} is damaged: remove {shown(folder)} and take the checkpoint before")
