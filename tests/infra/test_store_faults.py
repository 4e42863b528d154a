"""infra/objects.py and infra/uploads.py on a server that fails: what arrives is right, or there is a clear error."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra import objects, storage, stores, uploads
from infra.stores import WrongBytes
from tests.infra.fault_proxy import proxied

slow = pytest.mark.slow


@contextmanager
def faults(**shares: float) -> Iterator[Callable[[], dict[str, int]]]:
    """Between the bucket's server and us; yields what tells its counts."""
    with proxied(seed=8, **shares) as proxy, pytest.MonkeyPatch.context() as patched:
        patched.setattr(stores, "WAITS", (0.02, 0.04, 0.08, 0.2, 0.4, 0.8, 1.0))
        yield proxy.counts


@slow
def test_every_byte_is_right_through_faults(bucket: str, tmp_path: Path) -> None:
    dice = random.Random(0)
    sizes = [0, 1, 20_000_000, objects.PART, objects.PART + 1] + [int(10 ** dice.uniform(1, 5.3)) for _ in range(195)]
    files = {f"{number:03d}.bin": dice.randbytes(size) for number, size in enumerate(sizes)}
    root = storage.join(bucket, "mixed")
    with faults(errors=0.10, resets=0.02, truncated=0.01) as counts:

        def write(name: str) -> None:
            local = tmp_path / name
            local.write_bytes(files[name])
            if int(name[:3]) % 2:
                storage.write_bytes(storage.join(root, name), files[name])
            else:
                storage.upload(local, storage.join(root, name))

        def read(name: str) -> tuple[bool, ...]:
            url, data = storage.join(root, name), files[name]
            copy = storage.local_copy(url, tmp_path / "copies")
            middle = len(data) // 2
            with storage.open_read(url) as file:
                opened = file.read(100) + file.read()
            return (
                storage.read_bytes(url) == data,
                copy.read_bytes() == data,
                storage.read_range(url, middle, 1000) == data[middle : middle + 1000],
                opened == data,
            )

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, files))
            assert storage.find(root) == storage.list_names(root) == sorted(files)
            assert set(pool.map(read, files)) == {(True,) * 4}
        served = counts()
    assert min(served[name] for name in ("slow_down", "internal_errors", "resets", "replies_lost", "truncated")) >= 3
    assert _parts_left() == 0


def _parts_left() -> int:
    """Parts that lie in the bucket and belong to no object."""
    import boto3

    client = boto3.client("s3")
    begun = client.list_multipart_uploads(Bucket="lake").get("Uploads", [])
    parts = [client.list_parts(Bucket="lake", Key=one["Key"], UploadId=one["UploadId"]) for one in begun]
    return sum(len(listed.get("Parts", [])) for listed in parts)


@slow
def test_one_publisher_wins_and_each_learns_the_truth(bucket: str) -> None:
    def publish(url: str, data: bytes, barrier: threading.Barrier) -> bool:
        barrier.wait()
        return storage.publish_bytes(url, data)

    with faults(errors=0.1, resets=0.3) as counts, ThreadPoolExecutor(2) as pool:
        for number in range(30):
            url, barrier = storage.join(bucket, f"race/{number}.json"), threading.Barrier(2)
            texts = (b"one", b"one") if number % 3 == 0 else (b"one", b"two")
            won = list(pool.map(publish, (url, url), texts, (barrier, barrier)))
            assert sum(won) == 1, number
            assert storage.read_bytes(url) == texts[won.index(True)]
            assert storage.publish_bytes(url, b"late") is False
        assert counts()["replies_lost"] >= 5


@slow
def test_a_failed_upload_leaves_no_parts(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").write_bytes(bytes(objects.PART * 2 + 1))
    call, url = objects.call, storage.join(bucket, "failed/large")

    def fail(files: Any, method: str, path: str, moved: int = 0, **arguments: Any) -> dict[str, Any]:
        if arguments.get("PartNumber") == 3:
            raise PermissionError("no")
        return call(files, method, path, moved, **arguments)

    monkeypatch.setattr(uploads, "call", fail)
    with pytest.raises(PermissionError, match="s3://lake/failed/large: no"):
        storage.upload(tmp_path / "large", url)
    assert (storage.exists(url), _parts_left()) == (False, 0)


@slow
def test_a_file_that_is_replaced_while_it_is_read_is_never_a_mixture(bucket: str, tmp_path: Path) -> None:
    url, old, new = storage.join(bucket, "changing"), b"a" * (objects.PART + 9), b"b" * (objects.PART + 5)
    storage.write_bytes(url, old)
    with storage.open_read(url) as file:
        assert file.read(3) == b"aaa"
        storage.write_bytes(url, new)
        with pytest.raises(stores.Replaced, match="s3://lake/changing: replaced while it was read"):
            file.read()
    assert storage.read_bytes(url) == new
    assert storage.read_range(url, len(new) - 2, 5) == b"bb"
    assert storage.read_range(url, len(new) + 2, 5) == b""


@slow
def test_rotten_bytes_are_an_error_that_names_the_file(bucket: str, tmp_path: Path) -> None:
    import boto3

    url = storage.join(bucket, "rotten")
    notes = {objects.SHA256: "0" * 64}
    boto3.client("s3").put_object(Bucket="lake", Key="rotten", Body=b"rotten", Metadata=notes)
    for read in (storage.read_bytes, lambda url: storage.local_copy(url, tmp_path)):
        with pytest.raises(WrongBytes, match=r"s3://lake/rotten came 3 times .* remove it and run the stage"):
            read(url)
    with pytest.raises(ValueError, match=r"s3://lake/rotten came 3 times .* sha256 is not 1111"):
        storage.local_copy(url, tmp_path, "1" * 64)
    assert list(tmp_path.iterdir()) == []


@slow
@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_never_answers_is_an_error_in_time(
    bucket: str, listens: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It accepts and says nothing, or it is full of waiting callers and does not accept."""
    from s3fs import S3FileSystem

    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(64 if listens else 0)
    fillers = [] if listens else [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(silent.getsockname())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    for name, seconds in (("CONNECT", 0.3), ("SILENCE", 0.3), ("LIMIT", 1.0)):
        monkeypatch.setattr(stores, name, seconds)
    monkeypatch.setattr(objects, "SLOWEST", 64 << 20)
    S3FileSystem.clear_instance_cache()
    (tmp_path / "large").write_bytes(bytes(objects.PART))  # more than a socket's buffers hold
    url = "s3://lake/x"
    calls: list[Callable[[], Any]] = [
        lambda: storage.read_bytes(url),
        lambda: storage.size(url),
        lambda: storage.list_names(url),
        lambda: storage.publish_bytes(url, b"x"),
        lambda: storage.upload(tmp_path / "large", url),
        lambda: storage.remove_tree(url),
    ]
    try:
        for ask in calls:
            begun = time.monotonic()
            with pytest.raises(OSError, match=r"s3://lake/x cannot be reached \(.+\): check the network") as caught:
                ask()
            assert time.monotonic() - begun < 3
            assert "testing-secret" not in str(caught.value)
    finally:
        S3FileSystem.clear_instance_cache()
        for one in (silent, *fillers):
            one.close()


# ---- without a server: a file system in memory whose bodies are cut -------------------------------------------------


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes the next bodies are cut to, of files in `memory://`."""
    from fsspec.implementations.memory import MemoryFileSystem

    whole, lengths = MemoryFileSystem.cat_file, list[int]()

    def cat_file(self: Any, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data = bytes(whole(self, path, start=start, end=end, **kwargs))
        return data[: lengths.pop(0)] if lengths else data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(stores, "WAITS", (0.0, 0.0))
    return lengths


def test_a_body_that_is_cut_short_is_fetched_again(cut: list[int], tmp_path: Path) -> None:
    url = "memory://cut/x.json"
    storage.write_bytes(url, b'{"a": 1}')
    reads: list[tuple[Callable[[], Any], Any]] = [
        (lambda: storage.read_json(url), {"a": 1}),
        (lambda: storage.local_copy(url, tmp_path).read_bytes(), b'{"a": 1}'),
        (lambda: storage.read_range(url, 1, 3), b'"a"'),
        (lambda: storage.read_range(url, 6, 30), b"1}"),
        (lambda: storage.open_read(url).read(), b'{"a": 1}'),
    ]
    for read, expected in reads:
        cut[:] = [1, 0]
        assert read() == expected
        assert cut == []
    cut[:] = [1] * 3
    with pytest.raises(WrongBytes, match=r"memory://cut/x\.json: 1 of 8 bytes came, at every try: check"):
        storage.read_bytes(url)


def test_a_copy_has_the_digest_that_was_asked_for(tmp_path: Path) -> None:
    url, digest = "memory://digest/x", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    storage.write_bytes(url, b"hello")
    (tmp_path / "x").write_bytes(b"hello")
    for place in (url, str(tmp_path / "x")):
        assert storage.local_copy(place, tmp_path / "copies", digest).read_bytes() == b"hello"
        with pytest.raises(ValueError, match=r"x .*sha256 .*0000.* remove it and run the stage"):
            storage.local_copy(place, tmp_path / "copies", "0" * 64)


def test_no_try_begins_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WAITS", (0.05,) * 1000)
    monkeypatch.setattr(stores, "LIMIT", 0.2)
    tries = []

    def fail(files: Any, path: str) -> None:
        tries.append(path)
        raise TimeoutError

    begun = time.monotonic()
    with pytest.raises(OSError, match="memory://x cannot be reached"):
        stores.attempt("memory://x", fail)
    assert time.monotonic() - begun < 0.6
    assert 2 <= len(tries) <= 9
