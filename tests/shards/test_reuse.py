"""components/shards/reuse.py and group.py: a new version of a data set makes anew only what changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_helpers import make_data, plan, put, run_ingest, run_publish, tone

from components.schema import Annotation, Recording
from components.shards.group import plan_groups
from components.shards.index import read_index
from components.shards.reader import ShardReader, verify_shard
from components.shards.settings import Ingest
from infra import storage


def many(count: int, first: int = 0) -> list[Recording]:
    ids = [f"speaker{i % 7}/clip{i}" for i in range(first, first + count)]
    return [Recording(url=f"/data/{name}.wav", digest=name, annotation=Annotation(id=name)) for name in ids]


def members(recordings: list[Recording], per_shard: int) -> list[tuple[str, ...]]:
    return [tuple(item.key for item in group) for group in plan_groups(recordings, per_shard)]


@pytest.mark.slow
def test_groups_are_never_too_large_and_mostly_more_than_half_full() -> None:
    sizes = [len(group) for group in members(many(20_000), 256)]
    assert sum(sizes) == 20_000
    assert max(sizes) <= 256
    assert min(sizes[:-1]) == 128
    assert 165 < np.mean(sizes) < 215
    assert 0.05 < np.mean([size == 256 for size in sizes]) < 0.25


@settings(max_examples=10)
@given(st.integers(0, 1999), st.integers(1, 3))
def test_a_change_moves_few_groups(place: int, count: int) -> None:
    """Of about 85 groups; how far a change reaches is chance, and far reaches are rare."""
    whole = many(2000)
    before = set(members(whole, 32))
    added = many(count, first=10_000)
    after = members([*whole[:place], *added, *whole[place:]], 32)
    assert sum(group not in before for group in after) <= 20
    removed = members([*whole[:place], *whole[place + count :]], 32)
    assert sum(group not in before for group in removed) <= 20


@pytest.mark.slow
def test_a_typical_addition_makes_one_or_two_groups_anew() -> None:
    whole = many(2000)
    before = set(members(whole, 32))
    fresh = [
        sum(group not in before for group in members([*whole[:place], *many(1, 10_000), *whole[place:]], 32))
        for place in range(0, 2000, 50)
    ]
    assert np.median(fresh) <= 2
    assert np.mean(fresh) < 3


def test_another_version_takes_over_what_did_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, lake = str(tmp_path / "data"), str(tmp_path / "lake/audio/tones")
    recordings = [item for item in make_data(data, 8) if storage.exists(item.url)]
    run_ingest(f"{lake}/one", recordings, data)
    first = run_publish(f"{lake}/one", recordings, data)
    more = [*recordings, put(data, "new.wav", tone(0.4, 333), text="new")]
    reports = run_ingest(f"{lake}/two", more, data)
    assert [report.reused for report in reports] == [True, True, True, False]
    second = run_publish(f"{lake}/two", more, data)
    assert [shard.sha256 for shard in second.shards[:3]] == [shard.sha256 for shard in first.shards]
    assert (second.samples, second.rejected) == (first.samples + 1, first.rejected)
    for shard in second.shards:
        verify_shard(f"{lake}/two", shard)
    # Bytes are those of a lake that never had the first version.
    alone = str(tmp_path / "alone/audio/tones/two")
    run_ingest(alone, more, data)
    assert run_publish(alone, more, data) == second
    assert storage.read_bytes(f"{alone}/samples.parquet") == storage.read_bytes(f"{lake}/two/samples.parquet")
    # Without its first shard, here the first group moves behind: names change, bytes do not.
    fewer = recordings[3:]
    reports = run_ingest(f"{lake}/three", fewer, data)
    assert [report.reused for report in reports] == [True, True]
    assert [report.shard for report in reports] == ["shard-000000.tar", "shard-000001.tar"]
    third = run_publish(f"{lake}/three", fewer, data)
    assert [shard.sha256 for shard in third.shards] == [shard.sha256 for shard in first.shards[1:]]
    reader = ShardReader(f"{lake}/three")
    for row in read_index(f"{lake}/three").to_pylist():
        assert len(reader.waveform(row)) == row["samples"]


def test_a_group_with_a_missing_file_is_tried_again_in_the_next_version(tmp_path: Path) -> None:
    data, lake = str(tmp_path / "data"), str(tmp_path / "lake/audio/tones")
    recordings = make_data(data)  # the file of the second group's last recording is gone
    run_ingest(f"{lake}/one", recordings, data)
    assert [report.reused for report in run_ingest(f"{lake}/two", recordings, data)] == [True, False, True]


@pytest.mark.parametrize("fault", ["tar", "note", "gone"])
def test_what_is_damaged_in_the_other_version_is_made_anew(fault: str, tmp_path: Path) -> None:
    data, lake = str(tmp_path / "data"), str(tmp_path / "lake/audio/tones")
    recordings = make_data(data)[:2]
    run_ingest(f"{lake}/one", recordings, data)
    if fault == "tar":
        path = tmp_path / "lake/audio/tones/one/shard-000000.tar"
        damaged = bytearray(path.read_bytes())
        damaged[700] ^= 1
        path.write_bytes(damaged)
    elif fault == "note":
        (note,) = (tmp_path / "lake/audio/tones/known").iterdir()
        note.write_bytes(note.read_bytes().replace(b"one", b"two"))
    else:
        os.unlink(tmp_path / "lake/audio/tones/one/shard-000000.tar")
    assert [report.reused for report in run_ingest(f"{lake}/two", recordings, data)] == [False]
    for shard in run_publish(f"{lake}/two", recordings, data).shards:
        verify_shard(f"{lake}/two", shard)


def test_other_steps_are_another_group(tmp_path: Path) -> None:
    from components.shards.parts import group_digest

    (group,) = plan(many(3), "/data")[0]
    digests = {
        group_digest(group, "/data", settings)
        for settings in (Ingest(), Ingest(channels="first"), Ingest(measure=True), Ingest(duplicates="near"))
    }
    assert len(digests) == 4
    assert group_digest(group, "/data", Ingest(leaks="drop")) == group_digest(group, "/data", Ingest())
