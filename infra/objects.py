"""Remote files, whole and right: every byte that comes or goes is checked against what the store says it holds.

A store may cut a body short and call it complete, reset a connection after it has done what was asked, or refuse for
a while. Lengths are compared with a HEAD; bytes with the ETag where that is an MD5, and with the sha256 that
`infra/uploads.py` leaves in the metadata of what it sends in parts. What differs is fetched again. The other file
systems of fsspec keep no marks that are alike: there the length is compared.

Source of the ETag's rules: Amazon S3 API reference, "Object" and "Checking object integrity".
"""

from __future__ import annotations

import errno
import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from infra import stores
from infra.stores import Replaced, WrongBytes, shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART = 8 << 20  # bytes of a part; S3 takes 5 MiB to 5 GiB
MOST_PARTS = 10_000  # of one object; beyond 80 GB the parts grow
PARALLEL = 4  # parts of one file at once, so 32 MiB of memory
SLOWEST = 32 << 10  # bytes per second below which a transfer is given up
TRIES = 3  # whole files fetched before they count as damaged
SHA256 = "earloom-sha256"  # metadata of an object that was uploaded in parts
WRITER = "earloom-writer"  # metadata of an object that was published: a number that only its writer knows


@dataclass(frozen=True)
class Stored:
    """What a store says of a file; digests are in hexadecimal, and None where it does not keep them."""

    size: int
    etag: str = ""
    md5: str | None = None
    sha256: str | None = None
    writer: str | None = None

    def wanted(self, sha256: str | None = None) -> tuple[str, str] | None:
        """Algorithm and digest of the whole file, the strongest that is known."""
        known = (("sha256", sha256), ("sha256", self.sha256), ("md5", self.md5))
        return next(((name, digest) for name, digest in known if digest), None)


def is_s3(url: str) -> bool:
    return url.partition("://")[0] in stores.S3


# ---- calls ----------------------------------------------------------------------------------------------------------


def call(files: AbstractFileSystem, method: str, path: str, moved: int = 0, **arguments: Any) -> dict[str, Any]:
    """One request to S3, its body read; TimeoutError where `moved` bytes take too long."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    bucket, key, _ = files.split_path(path)
    limit = stores.SILENCE + moved / SLOWEST

    async def request() -> dict[str, Any]:
        reply = await files._call_s3(method, Bucket=bucket, Key=key, **arguments)
        if "Body" in reply:
            async with reply["Body"] as body:
                reply["Body"] = await body.read()
        return cast(dict[str, Any], reply)

    try:
        return cast(dict[str, Any], sync(files.loop, request, timeout=limit))
    except FSTimeoutError:
        raise TimeoutError(f"no answer within {limit:.3g} s") from None


def md5_of(reply: dict[str, Any], path: str) -> str | None:
    """The MD5 that an ETag is, unless the object was encrypted with a key, came in parts or lies in a zonal bucket."""
    etag = str(reply.get("ETag", "")).strip('"')
    secret = reply.get("ServerSideEncryption") not in (None, "AES256") or reply.get("SSECustomerAlgorithm")
    zonal = path.partition("/")[0].endswith("--x-s3")
    return etag if re.fullmatch("[0-9a-f]{32}", etag) and not secret and not zonal else None


def _said(reply: dict[str, Any], path: str) -> Stored:
    notes, etag = reply.get("Metadata", {}), str(reply.get("ETag", ""))
    size = int(str(reply.get("ContentRange", "")).rpartition("/")[2] or reply["ContentLength"])
    return Stored(size, etag, md5_of(reply, path), notes.get(SHA256), notes.get(WRITER))


def head(files: AbstractFileSystem, path: str) -> Stored:
    return _said(call(files, "head_object", path), path)


def stored(url: str) -> Stored:
    """What the store says of a file. FileNotFoundError, or IsADirectoryError for a folder."""
    if is_s3(url):
        try:
            return stores.attempt(url, head)
        except FileNotFoundError:
            raise _missing(url) from None
    info = stores.info(url)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{shown(url)} is a folder")
    return Stored(len(stores.attempt(url, _whole)) if info["size"] is None else int(info["size"]))


def _missing(url: str) -> OSError:
    """What is wrong with the URL of an S3 object that is not there."""
    if next(names(url, deep=False), None) is not None:
        return IsADirectoryError(f"{shown(url)} is a folder")
    return FileNotFoundError(shown(url))


def _whole(files: AbstractFileSystem, path: str) -> bytes:
    return bytes(files.cat_file(path))


# ---- reading --------------------------------------------------------------------------------------------------------


def _part(files: AbstractFileSystem, path: str, there: Stored, offset: int, length: int) -> bytes:
    whole = (offset, length) == (0, there.size)
    if "s3" not in files.protocol:
        data = _whole(files, path) if whole else bytes(files.cat_file(path, start=offset, end=offset + length))
    else:
        span = {} if whole else {"Range": f"bytes={offset}-{offset + length - 1}"}
        reply = call(files, "get_object", path, length, **span)
        if reply.get("ETag", there.etag) != there.etag:
            raise Replaced("replaced while it was read: read it again")
        data = reply["Body"]
    if len(data) != length:
        raise WrongBytes(f"{len(data)} of {length} bytes came")
    return data


def _first(files: AbstractFileSystem, path: str) -> tuple[Stored, bytes]:
    """What an S3 object is, with its first `PART` bytes: of most objects one request is all."""
    try:
        reply = call(files, "get_object", path, PART, Range=f"bytes=0-{PART - 1}")
    except OSError as error:
        if error.errno != errno.EINVAL:  # what S3 says of every range of an empty object
            raise
        return head(files, path), b""
    there, data = _said(reply, path), cast(bytes, reply["Body"])
    if len(data) != min(there.size, PART):
        raise WrongBytes(f"{len(data)} of {min(there.size, PART)} bytes came")
    return there, data


def part(url: str, there: Stored, offset: int, length: int) -> bytes:
    """`length` bytes that are known to be there. Replaced if the file is not the one of `there` any more."""
    return stores.attempt(url, lambda files, path: _part(files, path, there, offset, length)) if length else b""


def spans_of(size: int, length: int) -> list[tuple[int, int]]:
    return [(offset, min(length, size - offset)) for offset in range(0, size, length)]


def fetch(url: str, there: Stored, take: Callable[[int, bytes], Any], begin: int = 0) -> None:
    """Hand the bytes from `begin` on to `take`, with their offsets, from several threads and in any order."""
    spans = [(begin + offset, length) for offset, length in spans_of(there.size - begin, PART)]
    if len(spans) == 1:
        take(begin, part(url, there, *spans[0]))
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda span: take(span[0], part(url, there, *span)), spans))


def read(url: str) -> bytes:
    """All bytes of a file. WrongBytes if they are not those that the store has a checksum of."""
    for left in reversed(range(TRIES)):
        there, first = _begun(url)
        pieces = {0: first}
        try:
            fetch(url, there, pieces.__setitem__, len(first))
        except Replaced:
            if not left:
                raise
            continue
        data, wanted = b"".join(pieces[offset] for offset in sorted(pieces)), there.wanted()
        if wanted is None or hashlib.new(wanted[0], data, usedforsecurity=False).hexdigest() == wanted[1]:
            return data
    raise _damaged(url)


def _begun(url: str) -> tuple[Stored, bytes]:
    """What the store says of a file, and as many of its bytes as came with that."""
    return stores.attempt(url, _first) if is_s3(url) else (stored(url), b"")


def _damaged(url: str) -> WrongBytes:
    return WrongBytes(
        f"{shown(url)} came {TRIES} times with bytes that are not those of its checksum: it is damaged, "
        "remove it and run the stage that writes it again"
    )


def read_range(url: str, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; fewer only where the file ends before."""

    def action(files: AbstractFileSystem, path: str) -> bytes:
        try:
            if is_s3(url):
                span = f"bytes={offset}-{offset + length - 1}"
                data = cast(bytes, call(files, "get_object", path, length, Range=span)["Body"])
            else:
                data = bytes(files.cat_file(path, start=offset, end=offset + length))
        except OSError as error:
            if error.errno != errno.EINVAL:  # what S3 says of a range behind the end
                raise
            data = b""
        if len(data) == length:
            return data
        size = head(files, path).size if is_s3(url) else int(files.info(path)["size"])
        if len(data) != (expected := max(0, min(length, size - offset))):
            raise WrongBytes(f"{len(data)} of {expected} bytes from {offset} came")
        return data

    return stores.attempt(url, action)


def download(url: str, target: Path, sha256: str | None = None) -> None:
    """Bring a remote file to `target`, a new file, in parts.

    ValueError if its bytes have not the digest `sha256`, WrongBytes if without one they have not the store's.
    """
    for left in reversed(range(TRIES)):
        there = stored(url)
        try:
            _download(url, there, target)
        except Replaced:
            if not left:
                raise
            continue
        wanted = there.wanted(sha256)
        if wanted is None or digest_of(target, wanted[0]) == wanted[1]:
            return
    if sha256 is None:
        raise _damaged(url)
    raise ValueError(
        f"{shown(url)} came {TRIES} times with bytes whose sha256 is not {sha256}: it is damaged or another file, "
        "remove it and run the stage that writes it again"
    )


def _download(url: str, there: Stored, target: Path) -> None:
    with open(target, "wb") as file:
        file.truncate(there.size)
        # One write may take a part of what it gets, so whole writes, and in turn.
        turn = threading.Lock()

        def take(offset: int, data: bytes) -> None:
            with turn:
                file.seek(offset)
                file.write(data)

        fetch(url, there, take)


def digest_of(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False)).hexdigest()


# ---- listing --------------------------------------------------------------------------------------------------------


def names(url: str, deep: bool) -> Iterator[str]:
    """Files and folders directly in a folder, or all files below it; none if there is no such folder.

    Each page of an S3 listing is a call of its own, so that a fault costs one page.
    """
    if not is_s3(url):
        yield from stores.attempt(url, stores.names_below if deep else stores.names_in)
        return
    folder = url.partition("://")[2].strip("/").partition("/")[2]
    folder += "/" if folder else ""
    more: dict[str, Any] = {"Prefix": folder} | ({} if deep else {"Delimiter": "/"})
    while True:
        page = _page(url, more)
        yield from (entry["Key"][len(folder) :] for entry in page.get("Contents", ()))
        yield from (entry["Prefix"][len(folder) :].rstrip("/") for entry in page.get("CommonPrefixes", ()))
        if not page.get("IsTruncated"):
            return
        more = more | {"ContinuationToken": page["NextContinuationToken"]}


def _page(url: str, more: dict[str, Any]) -> dict[str, Any]:
    return stores.attempt(url, lambda files, path: call(files, "list_objects_v2", path, **more))
