"""components/shards/reader.py and tar.py: only what the manifest and the index say is read."""

from __future__ import annotations

import io
import random
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_helpers import make_data, run_ingest, run_publish

from components.digest import digest_bytes
from components.schema import ShardInfo
from components.shards.index import read_index, read_manifest
from components.shards.reader import ShardReader, member_names, verify_shard
from components.shards.tar import write_tar
from infra import storage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reader")
    data, lake = str(folder / "data"), str(folder / "lake")
    recordings = make_data(data)
    run_ingest(lake, recordings, data)
    run_publish(lake, recordings, data)
    return lake


def member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard_of(data: bytes, samples: int = 1) -> tuple[str, ShardInfo]:
    """A shard with these bytes, in a lake of its own, whose manifest is honest about size and sha256."""
    root = f"memory://{uuid.uuid4().hex}"
    storage.write_bytes(storage.join(root, "shard-000000.tar"), data)
    info = ShardInfo(name="shard-000000.tar", sha256=digest_bytes(data), bytes=len(data), samples=samples, seconds=1.0)
    return root, info


def test_a_whole_shard_is_accepted() -> None:
    verify_shard(*shard_of(tar_of(member("a.flac"), member("a.json"), member("b.safetensors")), samples=2))


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([member("a.flac", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "'a.flac' is not a plain file"),
        ([member("a.flac"), member("a.json", b"", type=tarfile.LNKTYPE, linkname="a.flac")], "'a.json' is not a plain"),
        ([member("a", b"", type=tarfile.DIRTYPE)], "'a' is not a plain file"),
        ([member("a.flac", b"", type=tarfile.FIFOTYPE)], "'a.flac' is not a plain file"),
        ([member("a.flac", b"", type=tarfile.CHRTYPE)], "'a.flac' is not a plain file"),
        ([member("../a.flac")], "not safe"),
        ([member("x/../../a.flac")], "not safe"),
        ([member("/etc/a.flac")], "not safe"),
        ([member("..\\a.flac")], "not safe"),
        ([member(".flac")], "not safe"),
        ([member("a.flac"), member("b.flac"), member("a.flac")], "'a.flac' occurs twice"),
        ([member("a.flac"), member("b.flac")], "it holds 2 samples, not 1"),
        ([], "it holds 0 samples, not 1"),
    ],
)
def test_a_shard_with_other_than_plain_unique_members_is_refused(
    members: list[tuple[tarfile.TarInfo, bytes]], fault: str
) -> None:
    with pytest.raises(ValueError, match=f"shard-000000.tar is damaged .*{fault}.*: delete it and run"):
        verify_shard(*shard_of(tar_of(*members)))


def test_a_packed_tar_is_refused() -> None:
    import gzip

    with pytest.raises(ValueError, match="is damaged"):
        verify_shard(*shard_of(gzip.compress(tar_of(member("a.flac")))))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:1024],
        lambda data: b"",
        lambda data: data + bytes(512),
        lambda data: bytes(len(data)),
        lambda data: data[:2000] + b"\1" + data[2001:],
    ],
)
def test_a_shard_that_is_cut_or_changed_is_detected(damage: Callable[[bytes], bytes], root: str) -> None:
    manifest = read_manifest(root)
    shard = manifest.shards[0]
    data = storage.read_bytes(storage.join(root, shard.name))
    other, _ = shard_of(damage(data))
    with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged .*run the ingest stage again"):
        verify_shard(other, shard)
    verify_shard(root, shard)
    with pytest.raises(FileNotFoundError, match=r"shard-000000\.tar"):
        verify_shard(f"memory://{uuid.uuid4().hex}", shard)


@settings(max_examples=30)
@given(st.binary(max_size=3000))
def test_random_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        verify_shard(*shard_of(data))


def listen(reader: ShardReader, row: dict[str, Any]) -> Any:
    try:
        return reader.waveform(row)
    except ValueError as error:
        return str(error)


def test_a_changed_clip_is_never_handed_out(root: str) -> None:
    row = read_index(root).to_pylist()[0]
    data = storage.read_bytes(storage.join(root, row["shard"]))
    whole = ShardReader(root).waveform(row)
    draw = random.Random(0)
    for _ in range(30):
        place = row["audio_offset"] + draw.randrange(row["audio_size"])
        changed = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        heard = listen(ShardReader(shard_of(changed)[0]), row)
        same = not isinstance(heard, str) and np.array_equal(heard, whole)
        assert same or (f"clip {row['key']}" in heard and "run the ingest stage again" in heard)


def test_rows_of_another_index_are_refused(root: str) -> None:
    one, two = read_index(root).to_pylist()[:2]
    reader = ShardReader(root)
    mixed = one | {name: two[name] for name in two if name.endswith(("_offset", "_size"))}
    for read in (reader.clip, reader.waveform):
        with pytest.raises(ValueError, match=rf"clip {one['key']}: .*is damaged .*: delete it and run"):
            read(mixed)
        with pytest.raises(ValueError, match="it ends before byte"):
            read(one | {"audio_offset": 10**9, "json_offset": 10**9})
        with pytest.raises(ValueError, match="no range"):
            read(one | {"audio_offset": -1, "json_offset": -1})
        with pytest.raises(ValueError, match="leads out of its folder"):
            read(one | {"shard": "../../secret.tar"})


def test_an_unfinished_or_damaged_index_is_never_read(root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the ingest stage, it resumes"):
        read_index(str(tmp_path))
    copy = str(tmp_path / "copy")
    for name in ("manifest.json", "samples.parquet"):
        storage.write_bytes(storage.join(copy, name), storage.read_bytes(storage.join(root, name)))
    assert read_index(copy).equals(read_index(root))
    data = storage.read_bytes(storage.join(copy, "samples.parquet"))
    for broken in (data[:-10], data[:200] + bytes(64) + data[264:], b""):
        storage.write_bytes(storage.join(copy, "samples.parquet"), broken)
        with pytest.raises(ValueError, match=r"samples\.parquet .*ingest again, it is rebuilt from the parts"):
            read_index(copy)
    storage.write_bytes(storage.join(copy, "manifest.json"), b'{"schema_version": 1}')
    with pytest.raises(ValueError, match=r"manifest\.json has no seal.*ingest again"):
        read_index(copy)


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=1500), max_size=6))
def test_write_tar_is_what_tarfile_reads(contents: list[bytes]) -> None:
    folder = storage.scratch("memory://x") / uuid.uuid4().hex
    folder.mkdir()
    path = folder / "x.tar"
    names = [f"{i}.bin" for i in range(len(contents))]
    written = write_tar(path, zip(names, contents, strict=True))
    data = path.read_bytes()
    storage.remove_tree(str(folder))
    assert (written.bytes, written.sha256, len(data) % 10_240) == (len(data), digest_bytes(data), 0)
    assert [data[offset : offset + size] for offset, size in written.members] == contents
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [tar.extractfile(info).read() for info in tar] == contents  # type: ignore[union-attr]
    assert list(member_names(io.BytesIO(data))) == names


def test_a_name_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is too long"):
        write_tar(tmp_path / "x.tar", [("x" * 101, b"")])


@pytest.mark.parametrize("room", ["1GB", "1kB"])
def test_shards_of_a_store_are_fetched_once_if_all_have_room(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", room)
    data, url = str(tmp_path / "data"), f"memory://{tmp_path.name}/lake/v1"
    recordings = make_data(data)
    run_ingest(url, recordings, data)
    manifest = run_publish(url, recordings, data)
    rows = read_index(url).to_pylist()
    reader = ShardReader(url, whole_shards=True)
    heard = [reader.waveform(row) for row in rows]
    kept = {path.name for path in (tmp_path / "home").rglob("*") if len(path.name) == 64}
    assert kept == ({shard.sha256 for shard in manifest.shards} if room == "1GB" else set())
    if kept:  # the store is not asked again
        for shard in manifest.shards:
            storage.remove_tree(storage.join(url, shard.name))
    again = [reader.waveform(row) for row in rows]
    assert [len(wave) for wave in again] == [row["samples"] for row in rows]
    assert all((one == other).all() for one, other in zip(heard, again, strict=True))
