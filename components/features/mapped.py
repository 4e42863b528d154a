"""Features where they lie: a shard mapped into memory, and tensors that are views of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

DTYPES = {  # of what a clip may hold, and what safetensors calls them
    "features": (torch.bfloat16, "BF16"),
    "units": (torch.int32, "I32"),
    "codes": (torch.int8, "I8"),
    "scale": (torch.float16, "F16"),
}


def map_file(path: Path) -> Bytes:
    """The bytes of a file, `(size,)`; read when they are touched, by the kernel, into memory that processes share.

    The file is opened for reading alone, and closed at once, so that thousands of shards need no descriptors; the map
    goes with the last array or tensor that shows it. It is private: who writes into a view gets a page of his own,
    the file stays as it is. OSError if the system refuses.
    """
    size = path.stat().st_size
    try:
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise OSError(
            f"{path} cannot be mapped into memory ({error}): allow address space for all shards that are read "
            "(ulimit -v and vm.overcommit_memory)"
        ) from error


def tensor_before(memory: Bytes, end: int, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that kind and shape whose bytes end at `end`: a view, which keeps `memory` alive.

    Its storage is the clip and not the shard, so that sending it to another process takes only the clip.
    """
    dtype = DTYPES[kind][0]
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)  # frombuffer refuses to show nothing
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=end - count * dtype.itemsize).view(shape)


def tensors_before(memory: Bytes, end: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`tensor_before` for several of them, by kind, which lie one behind the other and end at `end`."""
    found: dict[str, Tensor] = {}
    for kind in reversed(list(shapes)):
        found[kind] = tensor_before(memory, end, kind, shapes[kind])
        end -= found[kind].nbytes
    return found


def check_member(member: Bytes, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError if the safetensors bytes `(size,)` of a clip are not tensors of those kinds and shapes, in that order
    and at their end.

    What passes may be read by `tensors_before` without its header.
    """
    expected, length = {}, 0
    for kind, shape in shapes.items():
        after = length + math.prod(shape) * DTYPES[kind][0].itemsize
        expected[kind] = {"dtype": DTYPES[kind][1], "shape": list(shape), "data_offsets": [length, after]}
        length = after
    start = 8 + int.from_bytes(member[:8].tobytes(), "little")
    try:
        said = json.loads(member[8:start].tobytes())
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if said != expected or start + length != len(member):
        raise ValueError(f"it should hold {expected} behind its header, in {start + length} bytes, and holds {said}")
    largest = max(DTYPES[kind][0].itemsize for kind in shapes)  # it comes first, so the others are aligned as well
    if (member.ctypes.data + start) % largest:
        raise ValueError(f"its numbers do not lie at a multiple of {largest} bytes")
