"""Rows of an index: dictionaries made when they are asked for, from a table that stays a table."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.shards.index import JSON_COLUMNS, Rows

COUNT = 9000  # more than two batches of an iteration


def table(count: int) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "key": [f"k{i}" for i in range(count)],
        "split": [("train", "dev", None)[i % 3] for i in range(count)],
        "labels": [f'{{"digit":{i % 10}}}' for i in range(count)],
    }
    columns |= {name: ["null"] * count for name in JSON_COLUMNS if name not in columns}
    return pa.table(columns)


def test_a_row_has_its_json_read() -> None:
    assert Rows(table(12))[11] == {
        "key": "k11",
        "split": None,
        "labels": {"digit": 1},
        "translation": None,
        "marks": None,
        "conversations": None,
    }


def test_iteration_and_places_give_the_same_rows() -> None:
    rows = Rows(table(COUNT))
    assert [row["key"] for row in rows] == [f"k{i}" for i in range(COUNT)]
    assert all(rows[i] == row for i, row in zip(range(0, COUNT, 997), list(rows)[::997], strict=True))


@given(st.integers(0, 20), st.slices(20))
def test_slices_are_those_of_a_list(count: int, part: slice) -> None:
    rows = Rows(table(count))
    assert [row["key"] for row in rows[part]] == [f"k{i}" for i in range(count)][part]


@pytest.mark.parametrize("at", [5, -6])
def test_a_place_that_is_not_there(at: int) -> None:
    rows = Rows(table(5))
    assert (rows[-1]["key"], rows[-5]["key"], len(rows)) == ("k4", "k0", 5)
    with pytest.raises(IndexError, match=f"row {at} of 5"):
        rows[at]


def test_where_keeps_the_order_and_leaves_out_what_has_no_value() -> None:
    dev = Rows(table(COUNT)).where("split", "dev")
    assert [row["key"] for row in dev] == [f"k{i}" for i in range(1, COUNT, 3)]
    assert len(dev.where("key", "k1")) == 1
    assert dev[2]["key"] == "k7"
    assert len(dev.where("split", "test")) == 0
    assert list(dev.where("split", "test")) == []
