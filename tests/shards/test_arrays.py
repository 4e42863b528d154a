"""Columns of an index as numpy arrays: what Arrow's own conversion gives, and no pandas for it."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from components.shards.arrays import mask, numbers, read_parquet, rows_at

CELLS = st.lists(st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1)), max_size=40)


@given(st.lists(CELLS, max_size=4), st.integers(0, 20), st.sampled_from([pa.int32(), pa.int64()]))
def test_numbers_are_those_of_arrow(chunks: list[list[int | None]], start: int, kind: pa.DataType) -> None:
    column = pa.chunked_array([pa.array(chunk, kind) for chunk in chunks], kind).slice(start)
    found = numbers(column, -1)
    assert found.tolist() == [-1 if value is None else value for value in column.to_pylist()]
    assert found.dtype == np.dtype(str(kind))
    for chunk in column.chunks:
        assert numbers(chunk, 7).tolist() == chunk.fill_null(7).to_pylist()


@given(st.lists(st.integers(0, 2**40)))
def test_rows_at_go_to_arrow_and_back(places: list[int]) -> None:
    made = rows_at(np.array(places, np.int64))
    assert made.type == pa.int64() and made.to_pylist() == places
    assert rows_at(np.arange(10)[::2]).to_pylist() == [0, 2, 4, 6, 8]


@given(st.lists(st.booleans()))
def test_a_mask_goes_to_arrow_and_back(keep: list[bool]) -> None:
    assert mask(np.array(keep, bool)).to_pylist() == keep


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False)), max_size=20))
def test_numbers_may_be_broken_ones(cells: list[float | None]) -> None:
    found = numbers(pa.array(cells, pa.float64()), math.nan).tolist()
    assert [None if math.isnan(value) else value for value in found] == cells


def test_parquet_is_read_in_the_order_asked_for() -> None:
    table = pa.table({"a": [1, None], "b": ["x", "y"], "c": [{"d": 1}, None]})
    file = io.BytesIO()
    pq.write_table(table, file)
    assert read_parquet(file.getvalue()).equals(table)
    assert read_parquet(file.getvalue(), ("c", "gone", "a")).equals(table.select(["c", "a"]))
    coded = read_parquet(file.getvalue(), coded=("b",))["b"]
    assert coded.type == pa.dictionary(pa.int32(), pa.string()) and coded.to_pylist() == ["x", "y"]


def test_the_end_of_an_ingest_imports_no_pandas() -> None:
    program = """
import sys
from components.shards.checks import check
from components.shards.index import Rows, table_bytes, to_table
from components.shards.publish import publish
from components.shards.settings import Ingest
said = dict(audio_digest="a", original="a.wav", split="train", speaker="s", fingerprint=[1, 2, 3])
table = to_table([dict(said, key=key, id=key) for key in ("one", "two")])
found = check(table, Ingest(duplicates="near", leak_speakers=True))
assert len(found.report.duplicates["examples"]) == 1 and table_bytes(table) and len(Rows(table)[1:]) == 1
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
