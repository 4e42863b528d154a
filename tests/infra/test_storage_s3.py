"""infra/storage.py on an S3 server: what differs from a disk is listings, conditional puts and checksums."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from infra import objects, storage

pytestmark = pytest.mark.slow


def test_files_are_written_read_listed_and_removed(bucket: str, tmp_path: Path) -> None:
    root = storage.join(bucket, "audio")
    assert (storage.exists(root), storage.list_names(root), storage.find(root)) == (False, [], [])
    for name in ("v1/b.wav", "v1/deep/[a]*.wav", "v1/.tmp-1", "v10/c.wav"):
        storage.write_bytes(storage.join(root, name), name.encode())
    assert storage.list_names(root) == ["v1", "v10"]
    assert storage.list_names(storage.join(root, "v1")) == ["b.wav", "deep"]
    assert storage.find(storage.join(root, "v1")) == ["b.wav", "deep/[a]*.wav"]
    url = storage.join(root, "v1/deep/[a]*.wav")
    assert storage.list_names(url) == []
    assert (storage.size(url), storage.read_range(url, 3, 4)) == (16, b"deep")
    assert storage.read_range(url, 3, 99) == b"deep/[a]*.wav"
    with storage.open_read(url) as file:
        assert (file.seek(3), file.read(4)) == (3, b"deep")
    assert storage.local_copy(url, tmp_path).read_bytes() == url.removeprefix(root + "/").encode()
    first = storage.fingerprint(url)
    storage.write_bytes(url, b"other")
    assert storage.fingerprint(url) != first
    storage.remove_tree(storage.join(root, "v1"))
    assert storage.find(bucket) == ["audio/v10/c.wav"]
    for read in (storage.read_bytes, storage.size, storage.fingerprint):
        with pytest.raises(FileNotFoundError, match=r"s3://lake/audio/v1/b\.wav"):
            read(storage.join(root, "v1/b.wav"))
    with pytest.raises(IsADirectoryError):
        storage.size(root)


def test_what_another_process_wrote_is_seen_at_once(bucket: str) -> None:
    import boto3

    assert storage.list_names(storage.join(bucket, "fresh")) == []
    boto3.client("s3").put_object(Bucket="lake", Key="fresh/x", Body=b"1")
    assert storage.list_names(storage.join(bucket, "fresh")) == ["x"]
    boto3.client("s3").put_object(Bucket="lake", Key="fresh/x", Body=b"22")
    assert storage.size(storage.join(bucket, "fresh/x")) == 2


def test_uploads_of_a_file_and_a_folder(bucket: str, tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    storage.upload(tmp_path / "a", storage.join(bucket, "up/a"))
    storage.upload_folder(tmp_path, storage.join(bucket, "up/all"))
    assert storage.find(storage.join(bucket, "up")) == ["a", "all/a", "all/b/c"]
    assert storage.read_bytes(storage.join(bucket, "up/all/b/c")) == b"b/c" * 1000


def test_listings_go_on_over_pages(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, call, pages = [f"{number:02d}/x y+%.wav" for number in range(7)], objects.call, []

    def two(files: Any, method: str, path: str, moved: int = 0, **arguments: Any) -> dict[str, Any]:
        pages.append(method)
        return call(files, method, path, moved, **arguments | {"MaxKeys": 2})

    for name in names:
        storage.write_bytes(storage.join(bucket, "pages", name), b"")
    monkeypatch.setattr(objects, "call", two)
    assert storage.find(storage.join(bucket, "pages")) == names
    assert storage.list_names(storage.join(bucket, "pages")) == [name[:2] for name in names]
    assert pages == ["list_objects_v2"] * 8


def test_a_large_file_goes_in_parts_that_are_checked(bucket: str, tmp_path: Path) -> None:
    data, url = bytes(range(256)) * (objects.PART // 128 + 1), storage.join(bucket, "large")
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", url)
    there = objects.stored(url)
    assert (there.size, there.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert there.etag.endswith('-3"')
    assert storage.read_bytes(url) == data
    assert storage.local_copy(url, tmp_path / "copies", there.sha256).read_bytes() == data


def test_one_of_many_that_race_to_create_an_object_wins(bucket: str) -> None:
    url, won = storage.join(bucket, "race/manifest.json"), []

    def publish(number: int) -> None:
        if storage.publish_bytes(url, b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(url) == b"%d" % won[0]


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="s3://nowhere/x"):
        storage.write_bytes("s3://nowhere/x", b"")
