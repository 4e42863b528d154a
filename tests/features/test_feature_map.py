"""Reading features where they lie: views of mapped shards, checked once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache, rows_of
from safetensors.torch import load, save
from torch import Tensor

from components.features import store as store_module
from components.features.extract import extract_shard
from components.features.key import feature_key
from components.features.mapped import check_member, map_file, tensor_before
from components.features.store import FeatureStore, publish_features
from infra.storage import join, read_range, upload_folder

LENGTHS = [[0.3, 2.0, 0.05, 1.1], [1.0, 0.2, 2.4]]
WIDTH = 96  # a clip of two seconds is more than four pages of memory
inherited: list[FeatureStore] = []  # what a forked process finds


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    return make_cache(tmp_path / "lake", SmallEncoder(width=WIDTH), audio, index, tmp_path / "audio")


def stored_bytes(store: FeatureStore, key: str) -> bytes:
    place = store.place(key)
    return read_range(join(store.root, place.shard), place.offset, place.size)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def numbers_of(keys: list[str]) -> list[float]:
    """In a forked process: sums of what the inherited store reads."""
    return [float(inherited[0].load(key).float().sum()) for key in keys]


def test_a_view_has_the_bits_of_the_safetensors_and_is_no_copy(store: FeatureStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views = {key: store.load(key) for key in store.places}
    for key, view in views.items():
        assert view.shape == (store.frames(key), WIDTH)
        assert same_bits(view, load(stored_bytes(store, key))["features"])
        assert view.data_ptr() == store.load(key).data_ptr() and view.data_ptr() % 8 == 0
        shard = store.maps[store.place(key).shard]
        assert 0 < view.data_ptr() - shard.ctypes.data <= len(shard) - view.nbytes
        assert view.untyped_storage().nbytes() == view.nbytes  # what is sent along with it to another process
    assert len(store.maps) == 2


def test_units_are_views_of_int32(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder, root = SmallEncoder(), str(tmp_path / "units")
    codebook = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for shard in audio.shards:
        extract_shard(shard, rows_of(index, shard), str(tmp_path / "audio"), encoder, root, codebook)
    publish_features(root, feature_key(encoder, "a codebook"), audio)
    store = FeatureStore(root)
    for key in store.places:
        assert store.load(key).shape == (store.frames(key),)
        assert same_bits(store.load(key), load(stored_bytes(store, key))["units"])


def test_a_flipped_byte_is_refused_at_the_first_read_and_before_any_use(store: FeatureStore) -> None:
    place = store.place("000000-001")
    with open(Path(store.root) / place.shard, "r+b") as file:
        file.seek(place.offset + place.size - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 4]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'000000-001' in .*shard-000000.tar is damaged: delete .*run the cache"):
            store.load("000000-001")
    assert store.load("000000-003").shape == (55, WIDTH)
    assert sum(store.checked) == 1


@pytest.mark.parametrize(("remote", "checks"), [(False, 7), (True, 21)])
def test_a_local_clip_is_checked_once_and_a_remote_one_always(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, remote: bool, checks: int
) -> None:
    if remote:
        root = f"memory://map-{Path(store.root).parts[2]}-{os.getpid()}"
        upload_folder(Path(store.root), root)
        local, store = store, FeatureStore(root)
        assert all(same_bits(store.load(key), local.load(key)) for key in local.places)
        assert store.maps == {}
    seen: list[int] = []

    def counted(data: bytes) -> int:
        seen.append(len(data))
        return zlib.crc32(data)

    monkeypatch.setattr(store_module, "zlib", type("zlib", (), {"crc32": staticmethod(counted)}))
    for _ in range(3):
        for key in store.places:
            store.load(key)
    assert len(seen) == checks


def test_a_truncated_shard_is_refused_also_behind_a_page_that_was_mapped(store: FeatureStore) -> None:
    place = store.place("000000-003")
    assert store.load("000000-000").shape == (15, WIDTH)  # maps the shard while it is whole
    os.truncate(Path(store.root) / place.shard, place.offset)  # to touch the clip would now be a SIGBUS
    for opened in (store, FeatureStore(store.root)):
        with pytest.raises(ValueError, match=r"'000000-003' in .* is damaged"):
            opened.load("000000-003")
        assert opened.load("000000-001").shape == (100, WIDTH)
    (Path(store.root) / place.shard).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-000000.tar is missing: run the cache stage again"):
        FeatureStore(store.root).load("000000-003")


@pytest.mark.slow
def test_a_view_outlives_its_store_and_its_file(store: FeatureStore) -> None:
    tar = Path(store.root) / "shard-000001.tar"
    expected = load(stored_bytes(store, "000001-002"))["features"]
    opened = FeatureStore(store.root)
    view, again = opened.load("000001-002"), opened.load("000001-002")
    del opened
    tar.unlink()
    gc.collect()
    assert same_bits(view, expected)
    del view
    gc.collect()
    assert same_bits(again, expected) and maps_of(tar) == 1
    del again
    gc.collect()
    assert maps_of(tar) == 0


def test_a_store_holds_no_file_open(store: FeatureStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    views = [store.load(key) for key in store.places]
    assert len(os.listdir("/proc/self/fd")) == before and len(views) == 7


def test_writing_into_a_view_leaves_the_file_alone(store: FeatureStore) -> None:
    tar = Path(store.root) / "shard-000000.tar"
    before = tar.read_bytes()
    store.load("000000-001").zero_()
    assert tar.read_bytes() == before
    store.verify()


def test_threads_share_a_store(store: FeatureStore) -> None:
    expected = {key: load(stored_bytes(store, key))["features"] for key in store.places}
    for _ in range(20):
        shared = FeatureStore(store.root)
        with ThreadPoolExecutor(4) as pool:
            keys = store.keys() * 4
            for key, view in zip(keys, pool.map(shared.load, keys), strict=True):
                assert same_bits(view, expected[key])
        assert sorted(shared.maps) == ["shard-000000.tar", "shard-000001.tar"]
        assert sum(shared.checked) == 7


def test_a_forked_process_reads_on_and_a_sent_store_is_its_url(store: FeatureStore) -> None:
    keys = store.keys()
    expected = [float(store.load(key).float().sum()) for key in keys]
    inherited[:] = [store]
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(numbers_of, keys).result() == expected
        sent = pool.submit(store.load, keys[1]).result()  # the store goes there as its URL, the clip comes back
    assert same_bits(sent, store.load(keys[1]))
    inherited.clear()
    message = ForkingPickler.dumps(store)
    assert len(message) < 300 + len(store.root)
    again = ForkingPickler.loads(message)
    assert again.places == store.places and again.maps == {} and sum(again.checked) == 0


def test_a_clip_that_does_not_fit_the_index_is_refused(store: FeatureStore) -> None:
    store.manifest = store.manifest.model_copy(update={"width": WIDTH // 2})
    with pytest.raises(ValueError, match=r"'000000-000' in .* does not fit the index .*\[15, 48\].*run the cache"):
        store.load("000000-000")


def test_a_member_is_one_tensor_of_the_right_kind_and_shape() -> None:
    frames = torch.ones(4, 6, dtype=torch.bfloat16)
    whole = save({"features": frames})
    cases = {
        "should hold": save({"features": frames.half()}),
        "holds {'units'": save({"units": frames}),
        "[6, 4]": save({"features": frames.T.contiguous()}),
        "'more'": save({"features": frames, "more": frames.clone()}),
        "bytes, and holds": whole + b"\0",
        "not JSON": whole[:8] + b"[" + whole[9:],
        "header is not JSON": (1 << 62).to_bytes(8, "little") + whole[8:],
        "is not JSON": b"",
    }
    as_array = np.frombuffer(bytearray(whole), np.uint8)
    check_member(as_array, {"features": (4, 6)})
    assert same_bits(tensor_before(as_array, len(whole), "features", (4, 6)), frames)
    for message, data in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            check_member(np.frombuffer(data, np.uint8), {"features": (4, 6)})
    with pytest.raises(ValueError, match="multiple of 2 bytes"):
        check_member(np.frombuffer(bytearray(b"x" + whole), np.uint8)[1:], {"features": (4, 6)})


def test_a_clip_without_frames_and_a_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    empty = np.frombuffer(save({"features": torch.empty(0, 6, dtype=torch.bfloat16)}), np.uint8)
    check_member(empty, {"features": (0, 6)})
    assert tensor_before(empty, len(empty), "features", (0, 6)).shape == (0, 6)
    with pytest.raises(OSError, match=f"{tmp_path} cannot be mapped into memory"):
        map_file(tmp_path)
