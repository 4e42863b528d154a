"""infra/shard_cache.py: one download per machine, a bound in bytes, and nobody loses the file that is being read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from infra import objects, shard_cache, storage
from infra.shard_cache import cached_copy

REPOSITORY = Path(__file__).resolve().parents[2]
Shard = tuple[str, str, int]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", "350")
    return tmp_path / "home" / "shards"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs that were fetched."""
    fetched, fetch = list[str](), objects.download

    def download(url: str, target: Path, sha256: str | None = None) -> None:
        fetched.append(url)
        time.sleep(0.02)
        fetch(url, target, sha256)

    monkeypatch.setattr(objects, "download", download)
    return fetched


def shard(root: str = "", size: int = 100) -> Shard:
    data = uuid.uuid4().bytes * (size // 16) + bytes(size % 16)
    url = storage.join(root or "memory://shards", uuid.uuid4().hex)
    storage.write_bytes(url, data)
    return url, hashlib.sha256(data).hexdigest(), size


def kept(home: Path) -> set[str]:
    return {path.name for path in home.iterdir() if "." not in path.name}


def read(one: Shard) -> str:
    with cached_copy(*one) as path:
        return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_is_fetched_once_and_checked_again_if_it_changes(home: Path, downloads: list[str]) -> None:
    one = shard()
    assert [read(one), read(one)] == [one[1]] * 2
    assert (downloads, kept(home)) == ([one[0]], {one[1]})
    (home / one[1]).write_bytes(b"x" * one[2])  # the same size at another time
    assert read(one) == one[1]
    (home / one[1]).write_bytes(b"short")
    assert read(one) == one[1]
    (home / one[1]).unlink()
    assert read(one) == one[1]
    assert len(downloads) == 4


def test_many_that_ask_at_once_cause_one_download(downloads: list[str]) -> None:
    one = shard()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, [one] * 16)) == {one[1]}
    assert len(downloads) == 1


def test_the_least_recently_used_goes_first(home: Path, downloads: list[str]) -> None:
    a, b, c, d = (shard() for _ in range(4))
    for one in (a, b, c, a, d):
        read(one)
        time.sleep(0.002)
    assert kept(home) == {a[1], c[1], d[1]}
    large = shard(size=1000)
    assert read(large) == large[1]
    assert kept(home) == set()
    assert [path.name for path in home.iterdir()] == [".room"]


def test_a_shard_in_use_stays(home: Path, downloads: list[str]) -> None:
    held, others = [shard() for _ in range(4)], [shard() for _ in range(3)]
    with ExitStack() as stack:
        paths = [stack.enter_context(cached_copy(*one)) for one in held]
        for one in others:
            assert read(one) == one[1]
        assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == [one[1] for one in held]
        assert kept(home) == {one[1] for one in held}
    assert kept(home) == {one[1] for one in held[:3]}  # the fourth was the first to be let go


def test_a_crowd_with_too_small_a_cache_reads_what_is_right(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", "150")
    shards = [shard() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        wanted = [shards[number % 6] for number in range(60)]
        assert list(pool.map(read, wanted)) == [one[1] for one in wanted]
    assert len(kept(home)) <= 1


def test_what_is_not_the_shard_is_refused_and_not_kept(home: Path) -> None:
    url, sha256, size = shard()
    with pytest.raises(ValueError, match=rf"{url} came 3 times .* remove it"), cached_copy(url, "0" * 64, size):
        pass
    with pytest.raises(ValueError, match="has 100 bytes and not 99"), cached_copy(url, sha256, 99):
        pass
    with pytest.raises(FileNotFoundError, match="missing"), cached_copy("memory://missing", sha256, size):
        pass
    with pytest.raises(ValueError, match="is no sha256"), cached_copy(url, "../../x", size):
        pass
    assert [path.name for path in home.iterdir()] == [".room"]
    assert read((url, sha256, size)) == sha256


def test_local_shards_are_passed_through(tmp_path: Path, home: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x")
    with cached_copy(str(tmp_path / "x.tar"), "", 1) as path:
        assert path == tmp_path / "x.tar"
    with pytest.raises(FileNotFoundError), cached_copy(str(tmp_path / "y.tar"), "", 1):
        pass
    assert not home.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 20 * 10**9), ("20GB", 20 * 10**9), ("1.5 TiB", 1649267441664), ("7k", 7000), ("512 MiB", 2**29), ("12", 12)],
)
def test_sizes(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", text)
    assert shard_cache.limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "20 PB", "1i", "GB"])
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", text)
    with pytest.raises(ValueError, match=r"EARLOOM_SHARD_CACHE=.* is no size"), cached_copy("memory://x", "0" * 64, 1):
        pass


def test_a_stale_lock_file_is_nobodys(home: Path) -> None:
    """Who waited for a lock whose file was removed meanwhile takes the new file's."""
    one = shard()
    read(one)
    lock, entered = home / f"{one[1]}.lock", list[str]()
    with shard_cache._locked(lock, shard_cache.fcntl.LOCK_EX):
        waiter = threading.Thread(target=lambda: entered.append(read(one)))
        waiter.start()
        time.sleep(0.02)
        (home / one[1]).unlink()
        lock.unlink()
    waiter.join()
    assert (entered, lock.exists()) == ([one[1]], True)


USER = """
import hashlib, sys, time
from infra import objects
from infra.shard_cache import cached_copy
fetch = objects.download
def download(*a):
    print("fetched", flush=True)
    fetch(*a)
    time.sleep(0.5)
objects.download = download
with cached_copy(sys.argv[1], sys.argv[2], int(sys.argv[3])) as path:
    print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    sys.stdin.readline()
    print(path.exists(), flush=True)
"""


@pytest.mark.slow
def test_processes_share_one_download_and_the_locks_of_the_dead_are_free(
    bucket: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EARLOOM_SHARD_CACHE", "0")
    one = shard(bucket, 20_000_000)
    command = [sys.executable, "-c", USER, one[0], one[1], str(one[2])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    users = [subprocess.Popen(command, cwd=REPOSITORY, text=True, env=os.environ, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    said = [user.stdout.readline().strip() for user in users]
    fetcher = said.index("fetched")
    assert users[fetcher].stdout.readline().strip() == one[1]
    assert said[1 - fetcher] == one[1]
    users[fetcher].kill()
    users[fetcher].wait()
    shard_cache.make_room(0)
    assert kept(home) == {one[1]}  # the other still reads it
    assert users[1 - fetcher].communicate("\n", timeout=30)[0].strip() == "True"
    assert users[1 - fetcher].returncode == 0
    assert kept(home) == set()
    users[fetcher].communicate()
