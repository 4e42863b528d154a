from __future__ import annotations

import hashlib
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.features import index
from components.features.index import Place, Places, index_bytes, parse_index


def some_places(count: int) -> dict[str, Place]:
    draw = random.Random(0)
    return {
        f"clip-{i}": Place(f"shard-{i // 4:06d}.tar", 512 * i, draw.randrange(1 << 40), i, draw.randrange(1 << 32))
        for i in range(count)
    }


@pytest.mark.parametrize("count", [0, 1, 9])
def test_places_are_what_they_were_made_from_and_survive_the_file(count: int) -> None:
    expected = some_places(count)
    places = Places.of(expected.items())
    for found in (places, parse_index(index_bytes(places))):
        assert dict(found) == expected and list(found) == list(expected) and len(found) == count
        assert [found.at(row) for row in range(count)] == list(expected.values())
        assert found == places and "clip-9" not in found
    if count == 9:
        assert places["clip-5"][0] == "shard-000001.tar" and all(type(n) is int for n in places["clip-5"][1:])


@pytest.mark.parametrize("block", [1, 4, 100])
def test_the_digest_is_that_of_the_tuples_whatever_the_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(index, "BLOCK", block)
    places = some_places(9) | {"it's": Place("it's.tar", 1, 2, 3, 4)}
    lines = "".join(f"{key} {tuple(place)}\n" for key, place in places.items())
    assert Places.of(places.items()).sha256() == hashlib.sha256(lines.encode()).hexdigest()


def test_an_index_with_a_key_twice_or_other_columns_is_refused() -> None:
    rows = list(some_places(3).items())
    with pytest.raises(ValueError, match="1 keys are there twice"):
        Places.of([*rows, rows[0]])
    table = pq.read_table(io.BytesIO(index_bytes(Places.of(rows))))
    frames = table.schema.get_field_index("frames")
    others = [
        table.drop_columns(["crc32"]),
        table.set_column(frames, "frames", pa.array([1, None, 3], pa.int64())),
        table.set_column(frames, "frames", pa.array([1.0, 2.0, 3.0])),
    ]
    for other in others:
        buffer = io.BytesIO()
        pq.write_table(other, buffer)
        with pytest.raises(ValueError, match="its columns are not key, shard, offset, size, frames, crc32"):
            parse_index(buffer.getvalue())
