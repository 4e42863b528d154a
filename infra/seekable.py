"""A file in a store to read from and to seek in, as libraries ask for one."""

from __future__ import annotations

import io
import os
from typing import Any

from infra import objects
from infra.stores import shown


class Reader(io.RawIOBase):
    """A remote file to read from and to seek in; each read is a checked request for a range. Wrap it in a buffer.

    `error` is why the last read failed.
    """

    def __init__(self, url: str) -> None:
        self.url, self.there, self.at = url, objects.stored(url), 0
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.there.size}[whence]
        if at < 0:
            raise ValueError(f"{shown(self.url)}: {at} is no place in a file")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.there.size - self.at))
        try:
            buffer[:length] = objects.part(self.url, self.there, self.at, length)
        except Exception as error:
            self.error = error
            raise
        self.at += length
        return length

    def readall(self) -> bytes:
        pieces = dict[int, bytes]()
        if self.at < self.there.size:
            objects.fetch(self.url, self.there, pieces.__setitem__, self.at)
            self.at = self.there.size
        return b"".join(pieces[offset] for offset in sorted(pieces))
