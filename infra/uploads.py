"""Remote files written whole and right: by one request with an MD5, large ones in parts, each with its own.

The store refuses what does not fit its MD5, and the ETag that it answers is compared too, for some servers do not
look. A file appears when its last request is done, and parts of an upload that failed are removed. (A bucket's rule
for incomplete uploads is still wise: a machine that loses its power removes nothing.)

Source of the ETag of an object in parts, the MD5 of the parts' MD5s: Amazon S3 user guide, "Checking object integrity".
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra import stores
from infra.objects import MOST_PARTS, PARALLEL, PART, SHA256, WRITER, call, digest_of, head, is_s3, md5_of, spans_of
from infra.stores import WrongBytes

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MEMORY = threading.Lock()  # memory:// looks first and writes then


def write(url: str, data: bytes) -> None:
    """Write or replace a remote file."""
    if is_s3(url) and len(data) > PART:
        sha256 = hashlib.sha256(data).hexdigest()
        _send_parts(url, len(data), lambda offset, length: data[offset : offset + length], sha256)
    else:
        stores.attempt(url, lambda files, path: _put(files, path, data))


def send(url: str, local: Path) -> None:
    """Write or replace a remote file with a local one, which must not change meanwhile."""
    size = local.stat().st_size
    if not is_s3(url):
        stores.attempt(url, lambda files, path: _send_whole(files, path, local, size))
    elif size <= PART:
        write(url, local.read_bytes())
    else:
        with open(local, "rb") as file:
            sha256 = digest_of(local, "sha256")
            _send_parts(url, size, lambda offset, length: os.pread(file.fileno(), length, offset), sha256)


def _send_whole(files: AbstractFileSystem, path: str, local: Path, size: int) -> None:
    files.put_file(str(local), path)
    _check_size(files, path, size)


def _check_size(files: AbstractFileSystem, path: str, size: int) -> None:
    found = files.info(path)["size"]
    if found not in (None, size):
        raise WrongBytes(f"{found} of {size} bytes were stored")


def _put(files: AbstractFileSystem, path: str, data: bytes, writer: str = "") -> None:
    """One request. With a `writer` it is refused if the file is there."""
    if "s3" not in files.protocol:
        files.pipe_file(path, bytes(data), **({"mode": "create"} if writer else {}))
        _check_size(files, path, len(data))
        return
    md5 = hashlib.md5(data, usedforsecurity=False)
    options: dict[str, Any] = {"IfNoneMatch": "*", "Metadata": {WRITER: writer}} if writer else {}
    check = base64.b64encode(md5.digest()).decode()
    reply = call(files, "put_object", path, len(data), Body=bytes(data), ContentMD5=check, **options)
    if (md5_of(reply, path) or md5.hexdigest()) != md5.hexdigest():
        raise WrongBytes("what was stored has another MD5 than what was sent")


def publish(url: str, data: bytes) -> bool:
    """Write a remote file only if there is none; True if it was this call that wrote it.

    Its reply may be lost, and the next try then be refused because of what the first one wrote. An S3 object tells
    its writer by its metadata, even where two wrote the same bytes; of other stores' files the bytes are compared.
    """
    writer, tries = uuid.uuid4().hex, 0

    def create(files: AbstractFileSystem, path: str) -> bool:
        nonlocal tries
        tries += 1
        try:
            with _MEMORY if files.protocol == "memory" else nullcontext():
                _put(files, path, data, writer)
        except OSError as error:
            # A refusal is FileExistsError or, of SeaweedFS among others, a bare EINVAL that may mean other things.
            if not isinstance(error, FileExistsError) and (error.errno != errno.EINVAL or not files.exists(path)):
                raise
            return False
        return True

    def is_mine(files: AbstractFileSystem, path: str) -> bool:
        if not is_s3(url):
            return bytes(files.cat_file(path)) == data
        there = head(files, path)
        if there.writer != writer:
            return False
        if there.size != len(data) or there.md5 not in (None, hashlib.md5(data, usedforsecurity=False).hexdigest()):
            raise ValueError("was published with other bytes than were sent: remove it and run the stage again")
        return True

    # aiohttp sends a PUT again by itself when a connection that was used before breaks, so of S3 we always ask.
    return stores.attempt(url, create) or ((tries > 1 or is_s3(url)) and stores.attempt(url, is_mine))


# ---- parts ----------------------------------------------------------------------------------------------------------


def _send_parts(url: str, size: int, read: Callable[[int, int], bytes], sha256: str) -> None:
    """Upload in parts: `PARALLEL` at once, each read when it is its turn.

    A try whose very first reply is lost leaves an upload without parts, which holds and costs nothing.
    """
    spans = spans_of(size, max(PART, -(-size // MOST_PARTS)))
    begun = stores.attempt(
        url, lambda files, path: call(files, "create_multipart_upload", path, Metadata={SHA256: sha256})
    )
    upload = str(begun["UploadId"])
    try:
        with ThreadPoolExecutor(PARALLEL) as pool:
            numbered = enumerate(spans, 1)
            sent = list(pool.map(lambda part: _send_part(url, upload, part[0], read(*part[1])), numbered))
        stores.attempt(
            url, lambda files, path: _complete(files, path, upload, [etag for etag, _ in sent], size, sha256)
        )
        stores.attempt(url, lambda files, path: _check(files, path, sent, size, sha256))
    except BaseException:
        with suppress(OSError):
            stores.attempt(url, lambda files, path: call(files, "abort_multipart_upload", path, UploadId=upload))
        raise


def _send_part(url: str, upload: str, number: int, data: bytes) -> tuple[str, bytes]:
    """The store's ETag of a part, and the MD5 of what was sent."""
    md5 = hashlib.md5(data, usedforsecurity=False)
    check = base64.b64encode(md5.digest()).decode()

    def action(files: AbstractFileSystem, path: str) -> str:
        part = {"UploadId": upload, "PartNumber": number, "Body": data, "ContentMD5": check}
        reply = call(files, "upload_part", path, len(data), **part)
        if (md5_of(reply, path) or md5.hexdigest()) != md5.hexdigest():
            raise WrongBytes(f"part {number} was stored with another MD5 than it was sent with")
        return str(reply["ETag"])

    return stores.attempt(url, action), md5.digest()


def _complete(files: AbstractFileSystem, path: str, upload: str, etags: list[str], size: int, sha256: str) -> None:
    parts = {"Parts": [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]}
    try:
        call(files, "complete_multipart_upload", path, size, UploadId=upload, MultipartUpload=parts)
    except FileNotFoundError:  # so it is if an earlier try did it and its reply was lost
        if head(files, path).sha256 != sha256:
            raise


def _check(files: AbstractFileSystem, path: str, sent: list[tuple[str, bytes]], size: int, sha256: str) -> None:
    """That the object is what was sent; WrongBytes. Another that was put there meanwhile is none of our business."""
    there = head(files, path)
    if there.sha256 not in (None, sha256):
        return
    if there.size != size:
        raise WrongBytes(f"{there.size} of {size} bytes were stored")
    if all(etag.strip('"') == md5.hex() for etag, md5 in sent):  # else the store's ETags are made in another way
        whole = hashlib.md5(b"".join(md5 for _, md5 in sent), usedforsecurity=False).hexdigest()
        if there.etag.strip('"') != f"{whole}-{len(sent)}":
            raise WrongBytes("what was stored has another ETag than the parts that were sent")
