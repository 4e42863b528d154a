"""Shards of remote stores, kept on this disk: downloaded once per machine, checked once, the least recently used go.

They lie in `$EARLOOM_HOME/shards` (default `~/.cache/earloom/shards`), one file per sha256, together no larger than
`$EARLOOM_SHARD_CACHE` bytes (default 20 GB), unless what is in use is larger. Beside each lies `<sha256>.lock`, which
holds "size mtime" of the file as it was when its digest was checked; its own time is that of the last use. Who uses a
shard holds a shared lock on it, who downloads or removes it an exclusive one; the system frees the locks of a process
that dies. `.room` is locked by who makes room, so that two do not count the same bytes.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from infra import disk, objects, storage
from infra.environment import home

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
DEFAULT = "20GB"
TIDY = 1.0  # seconds; who reads clip after clip need not look for room after each
ROUNDS = 5  # others may remove a shard between its download and its use, but not for ever

_tidied = -TIDY  # when this process last looked for room


def folder() -> Path:
    """Where the shards lie."""
    return home() / "shards"


def limit() -> int:
    """Bytes that the shards may take, from `$EARLOOM_SHARD_CACHE`: a number, or one such as "20GB" or "1.5 TiB"."""
    text = os.environ.get("EARLOOM_SHARD_CACHE") or DEFAULT
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?\s*", text)
    unit = found[2][:1].upper() + found[2][1:] if found else None
    if found is None or unit not in UNITS:
        raise ValueError(
            f"EARLOOM_SHARD_CACHE={text!r} is no size: write bytes, or a number with kB, MB, GB, TB or GiB"
        )
    return int(float(found[1]) * UNITS[unit])


@contextmanager
def cached_copy(url: str, sha256: str, size: int) -> Iterator[Path]:
    """A file of this machine with the bytes of `url`, to read while the context lasts; a local one is passed through.

    `size` is in bytes. ValueError if the file has not this digest and size, FileNotFoundError if there is none, and
    OSError if the store cannot be reached or this disk is full.
    """
    if storage.is_local(url):
        path = storage.local_path(url)
        disk.regular(path)
        yield path
        return
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{storage.shown(url)}: {sha256[:80]!r} is no sha256; write the index of the shards again")
    path, allowed, fetched = folder() / sha256, limit(), False
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_file, rounds = path.with_suffix(".lock"), 0
    try:
        while rounds < ROUNDS:
            with _locked(lock_file, fcntl.LOCK_SH) as lock:  # waits while another downloads it
                if _usable(path, lock, size):
                    yield path
                    return
            with _alone(lock_file) as own:
                if own is None:  # another was faster; to wait for it here would be to wait until it has read the shard
                    time.sleep(random.uniform(0.005, 0.05))
                    continue
                rounds += 1
                if not _is_checked(path, own, size):
                    fetched = True
                    _download(url, path, own, size, allowed)
                fcntl.flock(own, fcntl.LOCK_SH)  # others may come between, so it is looked at again
                if _usable(path, own, size):
                    yield path
                    return
        raise OSError(f"{path} is removed again and again: make $EARLOOM_SHARD_CACHE larger than what is used at once")
    finally:
        if fetched or time.monotonic() - _tidied > TIDY:  # what was in use may have been more than there is room for
            make_room(allowed)


def distrust(copy: Path) -> None:
    """Let whoever asks for a shard next have it downloaded anew: its copy here is not what it was."""
    os.utime(copy)  # its time is no longer the one at which it was checked


@contextmanager
def _alone(path: Path) -> Iterator[int | None]:
    """The lock file, locked for nobody else; None if somebody has it."""
    with ExitStack() as held:
        try:
            handle = held.enter_context(_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            handle = None
        yield handle


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    """The open lock file, made if it is not there. BlockingIOError if `how` says not to wait."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, how)
            # Who removes a shard removes its lock file too: then this one is nobody's, and a new one is needed.
            if _is_at(handle, path):
                yield handle
                return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _usable(path: Path, lock: int, size: int) -> bool:
    """Whether what is held by `lock` is there and checked; its time of last use is now."""
    if not (_is_at(lock, path.with_suffix(".lock")) and _is_checked(path, lock, size)):
        return False
    os.utime(lock)
    return True


def _is_checked(path: Path, lock: int, size: int) -> bool:
    """Whether the file is still the one whose digest was checked."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_size == size and os.pread(lock, 64, 0) == _mark(size, status.st_mtime_ns)


def _mark(size: int, mtime: int) -> bytes:
    return f"{size} {mtime}\n".encode()


def _note(lock: int, mark: bytes) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, mark, 0)


def _download(url: str, path: Path, lock: int, size: int, allowed: int) -> None:
    _note(lock, _mark(size, 0))  # counted from now on
    make_room(allowed)
    part = path.with_suffix(".part")
    try:
        objects.download(url, part, path.name)
        if part.stat().st_size != size:
            raise ValueError(
                f"{storage.shown(url)} has {part.stat().st_size} bytes and not {size}: write its index again"
            )
        disk.sync(part)  # after a power failure its size and time must not vouch for bytes that are not there
        mtime = part.stat().st_mtime_ns
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        _note(lock, _mark(0, 0))
        raise
    _note(lock, _mark(size, mtime))


def make_room(allowed: int) -> None:
    """Remove the shards that were used longest ago, until the rest has `allowed` bytes; those in use stay."""
    global _tidied
    place, _tidied = folder(), time.monotonic()
    with _locked(place / ".room", fcntl.LOCK_EX):
        known = sorted((_last_use(lock), lock) for lock in place.glob("*.lock"))
        total = sum(size for (_, size), _ in known)
        for (_, size), lock in known:
            if total <= allowed and size:
                continue
            if _remove(lock):
                total -= size


def _last_use(lock: Path) -> tuple[int, int]:
    """When a shard was used last, in ns, and its bytes; 0 bytes if it is none (any more)."""
    try:
        return lock.stat().st_mtime_ns, int(lock.read_bytes().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return 0, 0


def _remove(lock: Path) -> bool:
    """Remove a shard and what belongs to it, unless it is in use."""
    try:
        with _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for suffix in ("", ".part", ".lock"):
                lock.with_suffix(suffix).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True
