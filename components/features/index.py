"""The index of a feature cache, `features.parquet`: which bytes of which shard hold the features of a clip."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.shards.arrays import read_parquet

BLOCK = 65_536  # clips that are digested at a time
SCHEMA: Any = pa.schema(
    [("key", pa.string()), ("shard", pa.string())]
    + [(name, pa.int64()) for name in ("offset", "size", "frames", "crc32")]
)


class Place(NamedTuple):
    """Where the features of a clip lie; the columns of `features.parquet` besides the key."""

    shard: str
    offset: int  # of the safetensors bytes in the tar
    size: int  # bytes
    frames: int
    crc32: int  # of the safetensors bytes


class Places(Mapping[str, Place]):
    """Key → place, in stored order.

    Kept as columns: a million clips are 0.2 GB in each process that reads the cache, a dict of tuples is 0.6 GB that
    the garbage collector walks through. `rows` gives the number of a clip in that order.
    """

    def __init__(
        self, keys: list[str], shards: list[str], codes: npt.NDArray[np.int32], numbers: npt.NDArray[np.int64]
    ) -> None:
        """`shards` are names, `codes` `(clips,)` says which of them, `numbers` `(4, clips)` are the other columns.

        ValueError if a key is there twice.
        """
        self.rows = dict(zip(keys, range(len(keys)), strict=True))
        if len(self.rows) != len(keys):
            raise ValueError(f"{len(keys) - len(self.rows)} keys are there twice")
        self.shards, self.codes, self.numbers = shards, codes, numbers
        self._columns = [column.data for column in numbers]  # an item of it is an int, and comes faster

    @classmethod
    def of(cls, rows: Iterable[tuple[str, Place]]) -> Places:
        """From pairs of key and place."""
        pairs = list(rows)
        codes: dict[str, int] = {}
        shards = np.fromiter((codes.setdefault(place.shard, len(codes)) for _, place in pairs), np.int32, len(pairs))
        numbers = np.array([place[1:] for _, place in pairs], np.int64).reshape(-1, 4).T
        return cls([key for key, _ in pairs], list(codes), shards, np.ascontiguousarray(numbers))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> Place:
        return self.at(self.rows[key])

    def at(self, row: int) -> Place:
        """The place of the clip with that number."""
        offset, size, frames, crc32 = [column[row] for column in self._columns]
        return Place(self.shards[self.codes.item(row)], offset, size, frames, crc32)

    def sha256(self) -> str:
        """Of one line per clip: `key ('shard', offset, size, frames, crc32)`."""
        total = hashlib.sha256()
        keys = list(self.rows)
        names = [repr(shard) for shard in self.shards]
        for start in range(0, len(keys), BLOCK):
            part = slice(start, start + BLOCK)
            rows = zip(keys[part], self.codes[part].tolist(), *self.numbers[:, part].tolist(), strict=True)
            total.update(
                "".join([f"{key} ({names[c]}, {o}, {s}, {f}, {crc})\n" for key, c, o, s, f, crc in rows]).encode()
            )
        return total.hexdigest()


def index_bytes(places: Places) -> bytes:
    """`features.parquet`: key, shard, offset and size in bytes of the safetensors in the tar, frames, crc32."""
    shards = pa.array(places.shards, pa.string()).take(pa.array(places.codes, pa.int32()))
    columns = [pa.array(list(places), pa.string()), shards, *map(pa.array, places.numbers)]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def parse_index(data: bytes) -> Places:
    """The index in the bytes of `features.parquet`; ValueError, OSError or an ArrowException if it is damaged."""
    table = read_parquet(data)
    if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
        raise ValueError(f"its columns are not {', '.join(SCHEMA.names)} of whole values")
    shards = pa.array([], pa.string()).dictionary_encode()
    if len(table):
        shards = table.column("shard").combine_chunks().dictionary_encode()
    numbers = np.stack([table.column(name).to_numpy() for name in Place._fields[1:]])
    keys: list[Any] = table.column("key").to_pylist()
    names: list[Any] = shards.dictionary.to_pylist()
    codes = shards.indices.to_numpy()
    del table, shards
    pa.default_memory_pool().release_unused()  # else arrow keeps as much memory as the index itself takes
    return Places(keys, names, codes, numbers)
