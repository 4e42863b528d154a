from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from feature_helpers import SmallEncoder, make_audio, rows_of

from components.features.cost import estimate, measure_speed
from components.features.extract import extract_shard

LENGTHS = [[1.0, 2.0, 3.0], [4.0, 5.0]]


def test_the_estimate_is_what_extraction_then_makes(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder, root = SmallEncoder(), str(tmp_path / "features")
    before = estimate(pa.Table.from_pylist(index), encoder, root)
    assert (before.clips, before.frames, before.shards_there, before.shards_missing) == (5, 750, 0, 2)
    assert before.hours == before.hours_missing == pytest.approx(15 / 3600)
    parts = [
        extract_shard(shard, rows_of(index, shard), str(tmp_path / "audio"), encoder, root)
        for shard in audio.shards[:1]
    ]
    half = estimate(index, encoder, root)
    assert (half.shards_there, half.shards_missing) == (1, 1)
    assert half.hours_missing == pytest.approx(9 / 3600)
    parts += [extract_shard(audio.shards[1], rows_of(index, audio.shards[1]), str(tmp_path / "audio"), encoder, root)]
    assert sum(part.frames for part in parts) == before.frames
    payload = sum(row.size for part in parts for row in part.rows)
    assert payload < before.bytes < payload + 5 * 1024
    assert "2 of 2 shards are there, nothing to do" in str(estimate(index, encoder, root))


def test_one_line_that_a_person_reads(tmp_path: Path) -> None:
    _, index = make_audio(tmp_path / "audio", LENGTHS)
    cost = estimate(index, SmallEncoder(), str(tmp_path / "features"), speed=30.0)
    assert str(cost) == (
        "5 clips, 0.00 h of audio: 750 frames, 16.3 kB; 0 of 2 shards are there, "
        "0.00 h of audio to encode (about 0.0 min at 30 x real time)"
    )
    assert "\n" not in str(cost)


def test_units_cost_four_bytes_a_frame(tmp_path: Path) -> None:
    _, index = make_audio(tmp_path / "audio", LENGTHS)
    features, units = (estimate(index, SmallEncoder(), str(tmp_path), units=kind) for kind in (False, True))
    assert features.bytes - units.bytes == 750 * (16 - 4)


def test_speed() -> None:
    assert measure_speed(SmallEncoder()) > 1
