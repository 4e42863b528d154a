"""One way to reach the lake: open, list and publish files at any fsspec URL or plain path.

Every write is atomic: a reader sees the old bytes or the new ones, never a part. Locally that is a file in the same
folder, forced to the disk and then renamed or linked; in an object store it is a single put, or parts that become
one object at the end. What comes from a store is checked (`infra/objects.py`). Files that are still being written
have names that begin with `.tmp-` or lie in a folder `.scratch`; no listing here shows them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from infra import disk, objects, seekable, stores, uploads
from infra.disk import UNFINISHED
from infra.names import pieces, single
from infra.stores import shown

STALE = 7 * 86_400  # seconds after which the scratch of a killed run is removed
THREADS = 16  # remote files that are removed or copied at once
BLOCK = 8 << 20  # bytes that are read ahead at a time


# ---- names ----------------------------------------------------------------------------------------------------------


def join(url: str, *parts: str) -> str:
    """`parts` below `url`. ValueError for a part that could lead out of it: absolute, a URL, or with `..` in it."""
    found = [piece for part in parts for piece in pieces(part, url)]
    scheme, colon, rest = url.rpartition("://")
    base = scheme + colon + (rest.rstrip("/") or rest[:1])
    return base + ("/" if found and not base.endswith("/") and base else "") + "/".join(found)


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine, written plainly or as `file://`."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The path behind a local URL; ValueError for a remote one."""
    if not is_local(url):
        raise ValueError(f"{shown(url)} is not on this machine: take a copy with storage.local_copy")
    return Path(_path(url))


def _path(url: str) -> str:
    """The same, where it is known to be local and asked for every file of a corpus: a Path takes six times as long."""
    return os.path.expanduser(url.rpartition("://")[2])


# ---- reading --------------------------------------------------------------------------------------------------------


def exists(url: str) -> bool:
    """Whether a file or a folder is there."""
    try:
        if is_local(url):
            local_path(url).stat()
        else:
            stores.info(url)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(url: str) -> int:
    """Bytes of a file. FileNotFoundError, or IsADirectoryError for a folder."""
    if is_local(url):
        return disk.regular(_path(url)).st_size
    return objects.stored(url).size


def has_size(url: str, expected: int) -> bool:
    """Whether a file is there and has so many bytes."""
    try:
        return size(url) == expected
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def read_bytes(url: str) -> bytes:
    """All bytes of a file."""
    if is_local(url):
        with disk.opened(_path(url)) as file:
            return file.read()
    return objects.read(url)


def announce(url: str) -> None:
    """Tell this machine that a file of its own will be read soon."""
    disk.announce(_path(url))


def read_range(url: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer where the file ends before."""
    if offset < 0 or length < 0:
        raise ValueError(f"{shown(url)}: {length} bytes from {offset} is no range")
    if is_local(url):
        with open(_path(url), "rb") as file:
            file.seek(offset)
            return file.read(length)
    return objects.read_range(url, offset, length) if length else b""


def read_text(url: str) -> str:
    """A UTF-8 file."""
    return read_bytes(url).decode()


def read_json(url: str) -> Any:
    """The value in a JSON file; ValueError that names the file if it is not JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{shown(url)} is not JSON ({error}): remove it and run the stage again") from error


def open_read(url: str, block: int = BLOCK) -> BinaryIO:
    """A file to read from and to seek in; of a remote one `block` bytes are read at a time. Close it."""
    if is_local(url):
        return open(local_path(url), "rb")
    return cast(BinaryIO, io.BufferedReader(seekable.Reader(url), block))


def read_error(file: BinaryIO) -> Exception | None:
    """Why the last read of a remote file from `open_read` failed: libraries that read it may hide the reason."""
    return getattr(getattr(file, "raw", None), "error", None)


def list_names(url: str) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty if there is no such folder."""
    try:
        names = os.listdir(local_path(url)) if is_local(url) else list(objects.names(url, deep=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and not name.startswith(UNFINISHED))


def find(url: str, suffixes: tuple[str, ...] | None = None, inside: bool = False) -> list[str]:
    """Files in a folder and below it, sorted, as paths relative to it; empty if there is no such folder.

    `suffixes` (such as `.wav`) choose some, capitals or not. Links to folders are followed, each folder once; with
    `inside` those that lead out of it are not, but are listed with `/` behind.
    """
    if is_local(url):
        names = list(disk.walk(local_path(url), inside))
    else:
        names = [name for name in objects.names(url, deep=True) if name and not name.endswith("/")]
        names = [name for name in names if not any(part.startswith(UNFINISHED) for part in name.split("/"))]
    return sorted(name for name in names if suffixes is None or name.lower().endswith(suffixes))


def leads_out(url: str, name: str, last: bool = False) -> bool:
    """Whether links lead from `name` below a local folder out of it; with `last` only its last part is looked at."""
    return is_local(url) and disk.leads_out(local_path(url), name, last)


def local_copy(url: str, folder: Path, sha256: str | None = None) -> Path:
    """The file itself if it is local, else a copy of it in `folder`. ValueError if its digest is not `sha256`."""
    if is_local(url):
        path = local_path(url)
        disk.regular(path)
        if sha256 is not None and fingerprint(url) != sha256:
            raise ValueError(f"{url} has not the sha256 {sha256}: remove it and run the stage that writes it again")
        return path
    target = folder / single(url.rpartition("/")[2], "a local copy")
    with disk.unfinished(target) as temporary:
        objects.download(url, temporary, sha256)
        os.replace(temporary, target)
    return target


def fingerprint(url: str, local: Callable[[], Any] = hashlib.sha256) -> str:
    """Digest of a file: `local` of its bytes on this machine, else sha256 of the checksum and size the store keeps."""
    if is_local(url):
        with disk.opened(_path(url)) as file:
            return str(hashlib.file_digest(file, local).hexdigest())
    info = stores.info(url)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{shown(url)} is a folder")
    marks = [f"{name}={info[name]}" for name in ("ETag", "etag", "md5Hash", "content_md5", "crc32c") if info.get(name)]
    text = f"{marks[0]} {info['size']}".encode() if marks else read_bytes(url)
    return hashlib.sha256(text).hexdigest()


# ---- writing --------------------------------------------------------------------------------------------------------


def write_bytes(url: str, data: bytes) -> None:
    """Write or replace a file, atomically."""
    if not is_local(url):
        uploads.write(url, data)
        return
    target = local_path(url)
    with disk.unfinished(target) as temporary:
        disk.fill(temporary, data)
        os.replace(temporary, target)
    disk.sync(target.parent)


def write_text(url: str, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(url, text.encode())


def write_json(url: str, value: Any) -> None:
    """`write_bytes` of JSON that a person can read; ValueError for NaN."""
    write_text(url, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def publish_bytes(url: str, data: bytes) -> bool:
    """Write a file only if there is none; True if it was this call that wrote it, however many raced."""
    if not is_local(url):
        return uploads.publish(url, data)
    target = local_path(url)
    with disk.unfinished(target) as temporary:
        disk.fill(temporary, data)
        created = disk.link(temporary, target)
    disk.sync(target.parent)
    return created


def upload(local: Path, url: str) -> None:
    """Bring a finished local file to its place, atomically; it is moved if that place is on the same disk."""
    if not is_local(url):
        uploads.send(url, local)
        return
    target = local_path(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    local.chmod(target.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
    disk.sync(local)
    try:
        os.replace(local, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        disk.copy(local, target)
        local.unlink()
    disk.sync(target.parent)


def upload_folder(local: Path, url: str, keep: bool = True) -> None:
    """Copy every file of a local folder below `url`, each atomically; without `keep`, files may be moved."""

    def copy(name: str) -> None:
        source, target = local / name, join(url, name)
        if keep and is_local(target):
            disk.copy(source, local_path(target))
        else:
            upload(source, target)

    names = find(str(local))
    large = [name for name in names if (local / name).stat().st_size > objects.PART]  # these go in parts, in parallel
    with ThreadPoolExecutor(1 if is_local(url) else THREADS) as pool:
        list(pool.map(copy, [name for name in names if name not in set(large)]))
    for name in large:
        copy(name)


def remove_tree(url: str) -> None:
    """Remove a file or a folder with all that is in it, if it is there; ValueError for a whole disk or bucket."""
    if is_local(url):
        path = local_path(url)
        if any(base.is_relative_to(path.resolve()) for base in (Path.home(), Path.cwd())):
            raise ValueError(f"{url} is not removed, it holds the home or working folder: name a folder of the lake")
        with suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return
    if not url.rpartition("://")[2].strip("/").partition("/")[2]:
        raise ValueError(f"{shown(url)} is not removed: name a folder in it")
    files = [join(url, name) for name in find(url)] or [url]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda file: stores.attempt(file, stores.remove), files))


def scratch(url: str) -> Path:
    """A folder for unfinished files that will become `url`: beside it if that is local, so that moving is renaming.

    What a killed run left there is removed after a week.
    """
    if is_local(url):
        folder = local_path(url).absolute().parent / ".scratch"
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.gettempdir()) / f"earloom-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):
            if entry.lstat().st_mtime < time.time() - STALE:
                remove_tree(str(entry))
    return folder
