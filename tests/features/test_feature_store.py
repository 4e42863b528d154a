from __future__ import annotations

import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache, rows_of

from components.features.extract import extract_shard
from components.features.key import feature_key
from components.features.store import INDEX, MANIFEST, FeatureStore, publish_features, published, up_to_date
from infra.storage import find, join, read_bytes, upload_folder

LENGTHS = [[0.3, 2.0, 0.05, 1.1], [1.0, 0.2, 2.4]]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    return make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")


def test_index_and_manifest_add_up(store: FeatureStore) -> None:
    table = pq.read_table(Path(store.root) / INDEX)
    assert table.column_names == ["key", "shard", "offset", "size", "frames", "crc32"]
    assert table.column("frames").to_pylist() == [15, 100, 3, 55, 50, 10, 120]
    manifest = store.manifest
    assert (manifest.samples, manifest.frames, manifest.width, manifest.kind) == (7, 353, 8, "features")
    assert manifest.fingerprint in store.root
    assert len(store) == 7 and "000001-002" in store and "nobody" not in store
    assert store.load("000001-002").shape == (120, 8)
    assert store.in_order(["000001-000", "000000-003", "000000-001"]) == ["000000-001", "000000-003", "000001-000"]
    store.verify()


def test_an_unknown_key_is_named(store: FeatureStore) -> None:
    with pytest.raises(KeyError, match="'nobody' is not in the feature cache"):
        store.load("nobody")


def test_verify_finds_every_flipped_bit(store: FeatureStore) -> None:
    tar = Path(store.root) / "shard-000001.tar"
    whole = tar.read_bytes()
    draw = random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"1 of 2 shards .* \(shard-000001.tar\).*run the cache stage again"):
            store.verify()
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar"):
        store.verify()


def test_load_refuses_a_flipped_bit_of_its_clip_and_only_of_its_clip(store: FeatureStore) -> None:
    place = store.place("000000-001")
    tar = Path(store.root) / place.shard
    whole, draw = tar.read_bytes(), random.Random(1)
    for _ in range(100):
        data = bytearray(whole)
        data[place.offset + draw.randrange(place.size)] ^= 1 << draw.randrange(8)
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"'000000-001' in .* is damaged"):
            store.load("000000-001")
        assert store.load("000000-003").shape == (55, 8)
    tar.write_bytes(whole[: place.offset + 10])
    with pytest.raises(ValueError, match="damaged"):
        store.load("000000-001")


def test_a_flipped_bit_in_the_index_is_refused(store: FeatureStore) -> None:
    index = Path(store.root) / INDEX
    whole, draw = index.read_bytes(), random.Random(2)
    for _ in range(40):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        index.write_bytes(data)
        with pytest.raises(ValueError, match=r"features\.parquet .*run the cache stage again"):
            FeatureStore(store.root)
    index.unlink()
    with pytest.raises(ValueError, match=r"features\.parquet .*run the cache stage again"):
        FeatureStore(store.root)


def test_a_manifest_that_is_missing_or_has_no_seal_is_refused(store: FeatureStore) -> None:
    path = Path(store.root) / MANIFEST
    old = store.manifest.model_dump(mode="json", exclude={"seal", "index_sha256"})
    path.write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r"manifest\.json has no seal: .* another version of this code: remove .*again"
    ):
        FeatureStore(store.root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="run the cache stage"):
        FeatureStore(store.root)


def test_a_cache_in_a_remote_store_has_the_bytes_of_a_local_one(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    lake = f"memory://features-{tmp_path.name}"
    upload_folder(tmp_path / "audio", join(lake, "audio"))
    local = make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")
    remote = make_cache(lake, SmallEncoder(), audio, index, join(lake, "audio"))
    remote.verify()
    assert remote.manifest == local.manifest
    assert up_to_date(remote.root, audio) == remote.manifest
    for key in local.places:
        assert torch.equal(remote.load(key), local.load(key))
    for name in find(local.root):
        assert read_bytes(join(remote.root, name)) == read_bytes(join(local.root, name))


def test_the_remedy_for_a_damaged_shard_gives_the_same_cache(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder = SmallEncoder()
    store = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
    root = Path(store.root)
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    assert up_to_date(store.root, audio) == store.manifest
    for name in ("shard-000000.tar", INDEX):
        (root / name).unlink()
        assert up_to_date(store.root, audio) is None
    encoder.calls = 0
    again = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
    assert encoder.calls == 4  # the four lengths of the one shard
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == before
    assert again.manifest == store.manifest


def test_publish_wants_every_shard_and_the_numerics_of_the_key(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder, root = SmallEncoder(), str(tmp_path / "features")
    key = feature_key(encoder)
    extract_shard(audio.shards[0], rows_of(index, audio.shards[0]), str(tmp_path / "audio"), encoder, root)
    with pytest.raises(ValueError, match=r"1 of 2 shards .* \(shard-000001.tar\): run the cache stage again"):
        publish_features(root, key, audio)
    assert published(root) is None
    extract_shard(audio.shards[1], rows_of(index, audio.shards[1]), str(tmp_path / "audio"), encoder, root)
    other = key | {"numerics": key["numerics"] | {"capability": "sm_90"}}
    with pytest.raises(ValueError, match=r"shard-000000.tar was made with .*sm_90"):
        publish_features(root, other, audio)
    manifest = publish_features(root, key, audio)
    assert publish_features(root, key, audio) == manifest == published(root)
    assert up_to_date(root, audio.model_copy(update={"digest": "0" * 64})) is None


def test_publishing_other_content_over_a_cache_is_refused(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    store = make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")
    manifest = (Path(store.root) / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match="published from other shards"):
        publish_features(store.root, store.manifest.key, audio.model_copy(update={"digest": "0" * 64}))
    assert (Path(store.root) / MANIFEST).read_bytes() == manifest


def test_a_store_crosses_a_process_boundary(store: FeatureStore) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(store.frames, "000000-001").result() == 100
