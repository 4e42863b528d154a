"""Bits that flip on a disk, in every kind of file of a lake: each is seen before what the file says is used."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from components.datacard.card import find_checks
from components.features import parts as feature_parts
from components.features import reuse as feature_reuse
from components.features.extract import extract_shard
from components.features.store import FeatureStore
from components.features.units import load_codebook, published_once
from components.registry.graph import read_graph
from components.schema import AudioManifest
from components.seal import read_sealed
from components.shards import parts as audio_parts
from components.shards import reuse as audio_reuse
from components.shards.index import read_index, read_manifest, read_rows
from components.shards.reader import ShardReader
from infra import shard_cache
from infra.storage import find, join, read_bytes, upload_folder, write_bytes
from tests.features.feature_helpers import SmallEncoder, make_cache, rows_of
from tests.shards.shard_helpers import make_data, run_ingest, run_publish

RECORDS = (
    *("audio manifest", "checks", "audio part", "audio note", "feature manifest", "feature part", "feature note"),
    *("components' manifest", "codebook's manifest"),
)
KINDS = (
    *RECORDS,
    *("audio index", "audio shard", "its records", "feature index", "feature shard", "small shard"),
    *("components", "codebook"),
)


class Kind(NamedTuple):
    """A kind of file: one of them, and what reads it first; that gives None where the file is made anew instead."""

    path: Path
    read: Callable[[], object]


class Lake(NamedTuple):
    folder: Path
    audio: AudioManifest
    audio_root: str
    rows: list[dict[str, Any]]
    kinds: dict[str, Kind]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Recordings through ingest, their features as they are and as 4 components in int8, and a codebook."""
    folder = tmp_path_factory.mktemp("flips")
    data, audio_root = str(folder / "data"), str(folder / "audio/tones/1")
    recordings, encoder = make_data(data, 5), SmallEncoder(width=32)
    run_ingest(audio_root, recordings, data)
    audio = run_publish(audio_root, recordings, data)
    rows, shard = list(read_rows(audio_root)), audio.shards[0]
    plain, small = (make_cache(folder, encoder, audio, rows, audio_root, form) for form in ("bf16", "pca-4-int8"))
    by_fingerprint = Path(plain.root).parents[1]
    part = read_sealed(feature_parts.part_url(plain.root, shard.name), feature_parts.FeaturePart)
    feature_reuse.remember(str(by_fingerprint), plain.root, part)
    fit = {"features": plain.manifest.digest, "keys": "", "clusters": 2, "seed": 0, "iterations": 1, "max_frames": 9}
    units = published_once(str(folder), fit | {"passes": 1, "units_version": 1}, lambda: (torch.eye(2), 9))[0]
    group = read_sealed(audio_parts.part_url(audio_root, 0), audio_parts.Part).inputs
    of_plain, of_small = bits_of(plain, shard.name), bits_of(small, shard.name)

    def reused() -> object:
        return feature_reuse.taken_over(str(by_fingerprint), str(folder / "other"), shard)

    kinds = {
        "audio manifest": Kind(Path(audio_root, "manifest.json"), lambda: read_manifest(audio_root)),
        "audio index": Kind(Path(audio_root, "samples.parquet"), lambda: read_index(audio_root)),
        "audio shard": Kind(Path(audio_root, shard.name), lambda: ShardReader(audio_root).waveform(rows[0])),
        "its records": Kind(Path(audio_root, shard.name), lambda: ShardReader(audio_root).clip(rows[0])),
        "checks": Kind(Path(audio_root, "checks.json"), lambda: find_checks(audio_root, audio)),
        "audio part": Kind(
            Path(audio_root, "parts/shard-000000.json"), lambda: audio_parts.finished_part(audio_root, 0, group)
        ),
        "audio note": Kind(
            folder / f"audio/tones/known/{group}.json",
            lambda: audio_reuse.taken_over(str(folder / "audio/tones/2"), 0, group),
        ),
        "feature manifest": Kind(Path(plain.root, "manifest.json"), lambda: FeatureStore(plain.root)),
        "feature index": Kind(Path(plain.root, "features.parquet"), lambda: FeatureStore(plain.root)),
        "feature shard": Kind(Path(plain.root, shard.name), lambda: loaded(plain.root, of_plain)),
        "small shard": Kind(Path(small.root, shard.name), lambda: loaded(small.root, of_small)),
        "feature part": Kind(
            Path(plain.root, "parts/shard-000000.json"), lambda: feature_parts.finished_part(shard, plain.root)
        ),
        "feature note": Kind(by_fingerprint / f"known/{shard.sha256}.json", reused),
        "components": Kind(Path(small.root, "projection/projection.safetensors"), lambda: FeatureStore(small.root)),
        "components' manifest": Kind(Path(small.root, "projection/projection.json"), lambda: FeatureStore(small.root)),
        "codebook": Kind(Path(units, "codebook.safetensors"), lambda: load_codebook(units)),
        "codebook's manifest": Kind(Path(units, "manifest.json"), lambda: load_codebook(units)),
    }
    return Lake(folder, audio, audio_root, rows, kinds)


def bits_of(store: FeatureStore, shard: str) -> dict[str, torch.Tensor]:
    return {key: store.load(key).clone() for key in store.places if store.place(key).shard == shard}


def loaded(root: str, right: dict[str, torch.Tensor]) -> FeatureStore:
    """Every clip of a shard, as for the first time; what is given before the damaged clip is what it should be."""
    store = FeatureStore(root)
    for key, expected in right.items():
        assert torch.equal(store.load(key), expected)
    return store


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Iterator[None]:
    """One bit of a file is another one; size and times are what they were."""
    before = path.stat()
    handle = os.open(path, os.O_RDWR)
    try:
        right = os.pread(handle, 1, place)
        os.pwrite(handle, bytes([right[0] ^ 1 << bit]), place)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        yield
    finally:
        os.pwrite(handle, right, place)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.close(handle)


def is_seen(kind: Kind) -> bool:
    """Whether a file is refused, by a message that names it and a remedy, or made anew."""
    try:
        return kind.read() is None
    except ValueError as error:
        return kind.path.name in str(error) and "again" in str(error)


def unseen(kind: Kind, places: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The flips, as byte and bit, that were not seen."""
    found = []
    for place, bit in places:
        with flipped(kind.path, place, bit):
            if not is_seen(kind):
                found.append((place, bit))
    assert kind.read() is not None  # the bits are back
    return found


def drawn(size: int, count: int) -> Iterator[tuple[int, int]]:
    """The first and the last byte, and some between them."""
    draw = random.Random(size)
    for place in (0, size - 1, *(draw.randrange(size) for _ in range(count - 2))):
        yield place, draw.randrange(8)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_seen_before_it_is_used(lake: Lake, name: str) -> None:
    kind = lake.kinds[name]
    assert kind.read() is not None
    assert unseen(kind, drawn(kind.path.stat().st_size, 25)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_seen_in_every_byte_of_a_record_and_in_thousands_of_the_rest(lake: Lake, name: str) -> None:
    kind = lake.kinds[name]
    size = kind.path.stat().st_size
    bits = random.Random(1)
    every = ((place, bits.randrange(8)) for place in range(size))
    assert unseen(kind, every if name in RECORDS or size < 3000 else drawn(size, 2500)) == []


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_without_a_seal_as_earlier_versions_wrote_it_is_refused_or_made_anew(lake: Lake, name: str) -> None:
    kind = lake.kinds[name]
    whole = kind.path.read_bytes()
    said = json.loads(whole)
    del said["seal"]
    kind.path.write_text(json.dumps(said))
    assert is_seen(kind)
    kind.path.write_bytes(whole)
    assert kind.read() is not None


@pytest.mark.parametrize("name", ["audio manifest", "feature manifest", "codebook's manifest", "components' manifest"])
def test_a_trace_names_a_flipped_record_and_does_not_believe_it(lake: Lake, name: str) -> None:
    path = next(lake.folder.glob("projections/*/projection.json"))
    path = path if name.startswith("components") else lake.kinds[name].path
    known = len(read_graph(str(lake.folder)).gaps)
    with flipped(path, 60, 0):
        gaps = read_graph(str(lake.folder)).gaps
    assert len(gaps) > known and any(str(path.parent) in gap.url and "is damaged" in gap.lacks for gap in gaps)


def test_a_flipped_bit_of_a_remote_clip_is_seen(lake: Lake) -> None:
    root, there = f"memory://flips-{lake.folder.name}", lake.kinds["feature shard"].path
    upload_folder(there.parent, root)
    store, url = FeatureStore(root), join(root, there.name)
    whole = read_bytes(url)
    for key in bits_of(store, there.name):
        place = store.place(key)
        for at, bit in drawn(place.size, 10):
            data = bytearray(whole)
            data[place.offset + at] ^= 1 << bit
            write_bytes(url, bytes(data))
            with pytest.raises(ValueError, match=rf"clip '{key}' in {url} is damaged"):
                store.load(key)


def test_a_flipped_bit_in_the_shard_cache_makes_no_features_and_is_fetched_anew(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path))
    root, shard, made = f"memory://audio-{lake.folder.name}", lake.audio.shards[0], tmp_path / "features"
    upload_folder(Path(lake.audio_root), root)
    with shard_cache.cached_copy(join(root, shard.name), shard.sha256, shard.bytes) as copy:
        pass

    def extract() -> object:
        return extract_shard(shard, rows_of(lake.rows, shard), root, SmallEncoder(width=32), str(made))

    right, before = copy.read_bytes(), copy.stat()
    for place in (shard.bytes - 1, int(lake.rows[0]["audio_offset"]) + 200):  # seen by its sha256, and by FLAC first
        copy.write_bytes(right[:place] + bytes([right[place] ^ 8]) + right[place + 1 :])
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ValueError, match=rf"{copy} is no true copy of {root}.*: run the stage again"):
            extract()
        assert find(str(made)) == []
        with shard_cache.cached_copy(join(root, shard.name), shard.sha256, shard.bytes) as copy:
            assert copy.read_bytes() == right
        before = copy.stat()
    extract()
    assert read_bytes(str(made / shard.name)) == lake.kinds["feature shard"].path.read_bytes()
