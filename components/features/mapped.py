"""Features where they lie: a shard mapped into memory, and tensors that are views of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

DTYPES = {"features": (torch.bfloat16, "BF16"), "units": (torch.int32, "I32")}  # and what safetensors calls them


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


def check_member(member: Bytes, kind: str, shape: tuple[int, ...]) -> None:
    """ValueError if the safetensors bytes `(size,)` of a clip are not one tensor `kind` of that shape, at their end.

    What passes may be read by `tensor_before` without its header.
    """
    dtype, name = DTYPES[kind]
    length = math.prod(shape) * dtype.itemsize
    expected = {kind: {"dtype": name, "shape": list(shape), "data_offsets": [0, length]}}
    start = 8 + int.from_bytes(member[:8].tobytes(), "little")
    try:
        said = json.loads(member[8:start].tobytes())
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if said != expected or start + length != len(member):
        raise ValueError(f"it should hold {expected} behind its header, in {start + length} bytes, and holds {said}")
    if (member.ctypes.data + start) % dtype.itemsize:
        raise ValueError(f"its numbers do not lie at a multiple of {dtype.itemsize} bytes")
