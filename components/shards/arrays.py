"""Columns of an index as numpy arrays, and back, without pandas.

Arrow's own `to_numpy` and `pa.array` import pandas to ask whether they were given something of it: a third of a second
and more on one core, at the end of every ingest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def numbers(column: Any, missing: int = 0) -> np.ndarray:
    """A column of integers (an array, or in chunks) as `(rows,)` of its type, `missing` where it is null."""
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


def _values(array: Any, missing: int) -> np.ndarray:
    here = slice(array.offset, array.offset + len(array))
    validity, data = array.buffers()
    values = np.frombuffer(data if data is not None else b"", str(array.type))[here]
    if not array.null_count:
        return values
    there = np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little")[here].astype(bool)
    return np.where(there, values, values.dtype.type(missing))
