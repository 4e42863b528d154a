"""Parquet as tables, and columns of an index as numpy arrays, and back, without pandas.

Arrow's own `read_table` and `group_by` import pandas, and `to_numpy` and `pa.array` do to ask whether they were given
something of it: a third of a second and more on one core, at the end of every ingest.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def read_parquet(data: bytes, columns: Sequence[str] | None = None, coded: Sequence[str] = ()) -> pa.Table:
    """The table in a Parquet file, or those of `columns` that it has, in their order; `coded` as dictionaries."""
    file = pq.ParquetFile(io.BytesIO(data), read_dictionary=list(coded))
    if columns is None:
        return file.read()
    there = set(file.schema_arrow.names)
    wanted = [name for name in columns if name in there]
    return file.read(wanted).select(wanted)


def numbers(column: Any, missing: float = 0) -> np.ndarray:
    """A column of numbers (an array, or in chunks) as `(rows,)` of its type, `missing` where it is null."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_values(chunk, missing) for chunk in chunks]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.zeros(0, str(column.type)), *parts])


def rows_at(places: np.ndarray) -> Any:
    """`(rows,)` whole numbers as an Arrow array, to `take` rows with."""
    wide = np.ascontiguousarray(places, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(wide), [None, pa.py_buffer(wide.data)])


def mask(keep: np.ndarray) -> Any:
    """`(rows,)` bool as an Arrow array, to `filter` rows by."""
    packed = np.packbits(keep, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(keep), [None, pa.py_buffer(packed.data)])


def _values(array: Any, missing: float) -> np.ndarray:
    here = slice(array.offset, array.offset + len(array))
    validity, data = array.buffers()
    values = np.frombuffer(data if data is not None else b"", str(array.type))[here]
    if not array.null_count:
        return values
    there = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[here].astype(bool)
    return np.where(there, values, values.dtype.type(missing))
