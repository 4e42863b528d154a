"""Files of this machine: written beside their place and then renamed or linked, listed without what is unfinished."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

UNFINISHED = (".tmp-", ".scratch")  # first letters of names that no listing shows


def regular(path: str | Path) -> os.stat_result:
    """Status of a file that can be read to its end: not a folder, pipe or device."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status


def opened(path: str | Path) -> FileIO:
    """Such a file, to be read; close it."""
    regular(path)  # to open a pipe would wait for its writer
    return open(path, "rb", buffering=0)


def announce(path: str | Path) -> None:
    """Tell the system that a file will be read soon: the disk begins while the processor is still busy elsewhere."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # whoever reads it says what is wrong
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe would wait for its writer
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def leads_out(root: Path, name: str | Path, last: bool = False) -> bool:
    """Whether links lead from `name` below a folder out of it; with `last` only its last part is looked at."""
    if last and not os.path.islink(root / name):
        return False
    base = os.path.realpath(root)
    target = os.path.realpath(os.path.join(base, name))
    return target != base and not target.startswith(os.path.join(base, ""))


def walk(root: Path, inside: bool = False) -> Iterator[str]:
    """Files below a folder, relative to it; links to folders are followed, each folder once.

    With `inside`, links to folders that lead out of it are not followed: they are named themselves, with `/` behind.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(UNFINISHED))
        here = Path(folder).relative_to(root)
        out = [name for name in folders if inside and Path(folder, name).is_symlink() and leads_out(root, here / name)]
        yield from (f"{(here / name).as_posix()}/" for name in out)
        folders[:] = [name for name in folders if name not in out]
        for name in names:
            if not name.startswith(UNFINISHED):
                yield Path(folder, name).relative_to(root).as_posix()


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A free name beside `target`; what is left there at the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def fill(path: Path, data: bytes) -> None:
    """A new file that is on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copy a file to its place, atomically."""
    with unfinished(target) as temporary:
        shutil.copyfile(source, temporary)
        sync(temporary)
        os.replace(temporary, target)


def link(temporary: Path, target: Path) -> bool:
    """Give a finished file its name if that is free; whether it was."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
        return _move_under_lock(temporary, target)
    return True


def _move_under_lock(temporary: Path, target: Path) -> bool:
    """For file systems without hard links (FAT, some network shares): the folder is the lock."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if target.exists():
            return False
        os.replace(temporary, target)
        return True
    finally:
        os.close(folder)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk; some network shares cannot do it for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)
