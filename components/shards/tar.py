"""Plain tars that are the same bytes on every run: ustar, no times, no owners, members in the order given."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK = 512
RECORD = 10_240  # bytes that a tar is padded to, as GNU tar does


@dataclass(frozen=True)
class WrittenTar:
    """What was written: digest and size of the file, and where the bytes of each member lie in it."""

    sha256: str
    bytes: int
    members: tuple[tuple[int, int], ...]  # (offset, size) of the data, in bytes, in the order given


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> WrittenTar:
    """Write `(name, data)` pairs to a tar at `path`, overwriting it, and force it to the disk.

    ValueError if a name is longer than ustar allows.
    """
    total = hashlib.sha256()
    places: list[tuple[int, int]] = []
    position = 0
    with open(path, "wb") as file:

        def put(data: bytes) -> None:
            nonlocal position
            file.write(data)
            total.update(data)
            position += len(data)

        for name, data in members:
            put(header(name, len(data)))
            places.append((position, len(data)))
            put(data)
            put(bytes(-len(data) % BLOCK))
        put(bytes(2 * BLOCK))
        put(bytes(-position % RECORD))
        file.flush()
        os.fsync(file.fileno())
    return WrittenTar(total.hexdigest(), position, tuple(places))


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: mode 0644, times and owners zero. ValueError if the name is too long for ustar."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.USTAR_FORMAT)
    made = bytearray(_EMPTY)  # tarfile takes ten times as long, which is felt with short clips
    made[: len(encoded)] = encoded
    made[124:136] = b"%011o\0" % size
    made[148:156] = b"%06o\0 " % (sum(made) - sum(made[148:156]) + 8 * 32)
    return bytes(made)


_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


def is_framed(tar: npt.NDArray[np.uint8], name: str, offset: int, size: int, end: int) -> bool:
    """Whether `write_tar` would write the bytes around a member, given all bytes of the tar `(size,)`.

    That is its header, and zeros from behind its data at `offset` to `end`: the next header, or the tar's own end.
    """
    before, behind = tar[offset - BLOCK : offset].tobytes(), tar[offset + size : end]
    return before == header(name, size) and not behind.any()
