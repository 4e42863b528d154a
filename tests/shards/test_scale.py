"""Memory grows with the rows of a data set by a little, and not at all with what a step does to them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.audio.sources import read_sources
from components.batching.measure import measure
from components.batching.plan import plan_stage
from components.registry.graph import read_graph
from components.registry.search import Subject
from components.registry.trace import forward
from components.schema import Annotation, Recording, slim
from components.shards.checks import check
from components.shards.duplicates import fingerprints, near_duplicates
from components.shards.group import plan_groups
from components.shards.index import JSON_COLUMNS, SCHEMA, read_rows
from components.shards.publish import publish
from components.shards.settings import Ingest
from models.recipe import Stage
from models.rendering import Audio, Rendered
from tests.benchmarks.scale import GROWTH, LIMIT, PER_FILE, Step, faults_of, run_step
from tests.benchmarks.scale_rows import write_manifest, write_parts
from tests.registry.lake_helpers import add_audio, index_table

MB = 1 << 20


def traced(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` returns, MB that are left of it, and its peak in MB, as Python and numpy count them."""
    tracemalloc.start()
    try:
        made = work()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return made, left / MB, peak / MB


@pytest.mark.slow
def test_a_recording_takes_little(tmp_path: Path) -> None:
    """A million of them must leave room for their index: 1.7 kB each, 2 kB while they are read."""
    left, peak = {}, {}
    for rows in (100, 200, 700):  # the first one pays for what is imported
        write_manifest(tmp_path / str(rows), rows)
        (found, rejects), left[rows], peak[rows] = traced(lambda rows=rows: read_sources(str(tmp_path / str(rows))))
        assert (len(found), rejects) == (rows, [])
    each, most = (left[700] - left[200]) * MB / 500, (peak[700] - peak[200]) * MB / 500
    assert 500 < each < 1900
    assert most < 2600


def test_what_rows_share_is_kept_once(tmp_path: Path) -> None:
    write_manifest(tmp_path, 300)
    (tmp_path / "more.csv").write_text("audio,speaker\n")  # speaks for nothing: manifest.jsonl counts more
    found, _ = read_sources(str(tmp_path))
    assert len({id(one.url) for one in found}) == 3 == len({one.url for one in found})
    assert len({id(one.annotation.licence) for one in found}) == 1
    speakers = [one.annotation.speaker for one in found]
    assert len({id(one) for one in speakers}) == len(set(speakers))


def test_a_slim_model_is_the_same() -> None:
    plain = Recording(url="a", digest="b", annotation=Annotation(id="c"), start=1.0)
    thin = slim(Recording(url="a", digest="b", annotation=slim(Annotation(id="c")), start=1.0))
    assert thin == plain
    assert thin.model_dump_json() == plain.model_dump_json()
    changed = thin.model_copy(update={"start": 2.0})
    assert changed == plain.model_copy(update={"start": 2.0})
    assert slim(Annotation(id="d")).model_fields_set == set()  # which the copy did not touch


def many_rows(rows: int, length: int) -> pa.Table:
    """An index whose fingerprints have `length` hashes; every hundredth row is a copy of the one before."""
    table = index_table(rows)
    hashes = np.random.default_rng(0).integers(1, 1 << 32, (rows, length), dtype=np.uint32)
    hashes[99::100] = hashes[98::100]
    hashes[99::100, ::2] ^= 1
    values = pa.array(hashes.ravel())
    prints = pa.ListArray.from_arrays(pa.array(np.arange(0, rows * length + 1, length), pa.int32()), values)
    return table.set_column(SCHEMA.get_field_index("fingerprint"), SCHEMA.field("fingerprint"), prints)


@pytest.mark.slow
def test_duplicates_are_looked_for_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hashes there are, so many are sorted at a time; twice the rows take little more."""
    monkeypatch.setattr("components.shards.duplicates.PART", 1 << 15)
    monkeypatch.setattr("components.shards.duplicates.BLOCK", 1 << 14)
    peaks = {}
    for rows in (5000, 20_000):
        table = many_rows(rows, 12)
        pairs, _, peaks[rows] = traced(lambda table=table: near_duplicates(table))
        assert len(pairs) == rows // 100
        assert all(pair.rows[1] == pair.rows[0] + 1 for pair in pairs)
    grown = (peaks[20_000] - peaks[5000]) * MB / 15_000
    assert grown < 500  # bytes a row: fingerprint, place, count, and its digest and key as text


def test_quiet_rows_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without hashes, and with silence in them, where blocks of hashes begin and end."""
    drawn = np.random.default_rng(3)
    made = [drawn.integers(1, 1 << 32, int(n), dtype=np.uint32) for n in drawn.integers(0, 20, 300)]
    for row in range(0, 300, 7):
        made[row] = np.zeros(len(made[row]), np.uint32)
    for row in range(10, 300, 25):
        made[row] = made[row - 2] if len(made[row - 2]) else made[row]
    text = {name: pa.array([f"{name}{row}" for row in range(300)]) for name in ("key", "audio_digest")}
    table = pa.table(text | {"fingerprint": pa.array([one.tolist() for one in made], pa.list_(pa.uint32()))})
    whole = near_duplicates(table)
    monkeypatch.setattr("components.shards.duplicates.BLOCK", 17)
    monkeypatch.setattr("components.shards.duplicates.PART", 100)
    assert near_duplicates(table) == whole
    heard = [row for row in range(10, 300, 25) if np.count_nonzero(made[row]) >= 8 and (row - 2) % 7]
    assert [pair.rows for pair in whole] == [(row - 2, row) for row in heard]
    assert len(heard) >= 3
    assert int(fingerprints(table).counts.sum()) == sum(map(len, made))


def test_a_table_without_faults_is_not_copied() -> None:
    table = index_table(100)
    assert check(table, Ingest(duplicates="exact")).table is table


def test_samples_are_measured_in_small_arrays() -> None:
    """With 15 numeric columns: 100 bytes each, where lists took 800."""
    row = {"key": "k", "text": "stop", "seconds": 1.0, "labels": {}, "translation": {}, "caption": None}
    row |= {"conversations": None, "original": "books/k.wav", "shard": "s", **{f"m{n}": 0.5 for n in range(14)}}
    stage = Stage(name="scale", train=("lora",), tasks={"asr": 1.0}, batch_tokens=1000)
    rendered = Rendered(ids=[1] * 40, labels=[2] * 40)
    samples, left, peak = traced(
        lambda: measure(stage, (dict(row) for _ in range(1000)), lambda _: Audio(), lambda *_: rendered)
    )
    assert len(samples) == 1000
    assert left * MB / 1000 < 130
    assert peak * MB / 1000 < 300
    plan = plan_stage(stage, samples, 0, "packed")
    assert (len(plan), len(plan.order)) == (40, 1000)


def test_plans_leave_fingerprints_where_they_are(tmp_path: Path) -> None:
    table = many_rows(200, 12)
    for name in JSON_COLUMNS:
        table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(["{}"] * 200))
    add_audio(str(tmp_path), "talk", "v", table)
    rows = read_rows(str(tmp_path / "audio/talk/v"))
    assert "fingerprint" not in rows.table.column_names
    assert rows[3]["key"] == "0000003"


def small_lake(folder: Path, rows: int) -> str:
    """A data set published from made-up parts."""
    data, root = str(folder / "data"), str(folder / "lake/audio/scale/v")
    write_manifest(folder / "data", rows)
    settings = Ingest(duplicates="near")
    groups = plan_groups(read_sources(data)[0])
    write_parts(root, groups, data, settings)
    manifest = publish(root, "scale", "v", groups, [], data, settings=settings)
    assert manifest.samples + manifest.rejected == rows
    assert manifest.asides["duplicate"] == pytest.approx(0.02 * rows, rel=0.4)
    return str(folder / "lake")


def test_what_was_dropped_is_traced_from_the_records(tmp_path: Path) -> None:
    lake = small_lake(tmp_path, 500)
    (part,) = forward(read_graph(lake), Subject("file", "talk-00003.flac")).audio
    assert part.clips + part.dropped == 100
    assert part.dropped > 0
    (whole,) = forward(read_graph(lake), Subject("dataset", "scale")).audio
    assert whole.clips + whole.dropped == 500


def test_the_benchmark_finds_growth() -> None:
    def ingest(worker: int, grown: int = 0, samples: int = 100) -> Step:
        said = {"workers": [1, worker], "driver": 10**8 + grown, "samples": samples, "different": 100}
        return Step("ingest", 1.0, 1.0, 10**8 + 2 * grown, 0, said)

    few = ingest(1000)
    assert faults_of(few, ingest(1000 + int(900 * GROWTH), 300 * PER_FILE), 300) == []
    grown = faults_of(few, ingest(1200, 300 * PER_FILE + 300, samples=101), 300)
    assert [fault[:9] for fault in grown] == ["a worker'", "the drive", "101 sampl"]


@pytest.mark.slow
def test_two_hundred_thousand_rows(tmp_path: Path) -> None:
    """A fifth of the benchmark's rows: sources and publish, each a process of its own; a million stays within 4 GB."""
    write_manifest(tmp_path / "data", 200_000)
    sources = run_step("sources", tmp_path)
    assert sources.said["recordings"] == 200_000
    assert sources.base + 5 * (sources.peak - sources.base) < 2.5e9
    each = (sources.peak - sources.base) / 200_000
    assert 500 < each < 2300, json.dumps(sources._asdict())
    assert sources.peak < LIMIT / 5
