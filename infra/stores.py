"""Files of object stores and other machines: calls that are tried again, and refusals that tell no secret."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, TypeVar, cast

import fsspec
from fsspec import AbstractFileSystem

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0)  # seconds between the tries of a call: an outage of half a minute passes

# File systems that remember listings, which other processes make wrong.
LISTED = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "http", "https")
PERMANENT: tuple[type[Exception], ...] = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ValueError, TypeError, AttributeError, LookupError, ImportError),
)
_MEMORY = threading.Lock()  # memory:// looks first and writes then


def _remote(url: str) -> tuple[AbstractFileSystem, str]:
    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown(url)} cannot be opened ({error}): install that package or correct the URL") from None
    options = kind._get_kwargs_from_urls(url) | ({"use_listings_cache": False} if protocol in LISTED else {})
    return kind(**options), kind._strip_protocol(url).rstrip("/")


def attempt(url: str, action: Callable[[AbstractFileSystem, str], T]) -> T:
    """`action` on the file system and path of a URL, again after a while if the reason may pass."""
    files, path = _remote(url)
    for wait in (*WAITS, None):
        try:
            return action(files, path)
        except PERMANENT as error:
            kind = next(kind for kind in PERMANENT if isinstance(error, kind))
            raise kind(f"{shown(url)}: {shown(str(error)) or kind.__name__}") from None
        except Exception as error:  # noqa: BLE001 each store has exceptions of its own, and no common base
            if wait is None or "Credential" in type(error).__name__:
                raise OSError(
                    f"{shown(url)} cannot be reached ({type(error).__name__}: {shown(str(error))}): "
                    "check the network, the endpoint and the credentials"
                ) from None
            time.sleep(wait * (0.5 + random.random()))
    raise AssertionError("unreachable: the last try returns or raises")


def info(url: str) -> dict[str, Any]:
    """What the store says of a file or a folder: `type`, `size` and often a checksum. FileNotFoundError."""
    return attempt(url, lambda files, path: cast(dict[str, Any], files.info(path)))


def names_in(files: AbstractFileSystem, path: str) -> list[str]:
    """Names directly in a folder; none for a file, FileNotFoundError for nothing."""
    found = [str(entry["name"]).rstrip("/") for entry in files.ls(path, detail=True)]
    return [name.rpartition("/")[2] for name in found if name.strip("/") != path.strip("/")]


def names_below(files: AbstractFileSystem, path: str) -> list[str]:
    """Paths of all files below a folder, relative to it; none if there is no such folder."""
    try:
        return [str(name)[len(path) :].lstrip("/") for name in files.find(path)]
    except FileNotFoundError:
        return []


def put(files: AbstractFileSystem, path: str, data: bytes) -> None:
    files.pipe_file(path, bytes(data))


def create(files: AbstractFileSystem, path: str, data: bytes) -> bool:
    """Write a file if there is none; whether it was written."""
    try:
        with _MEMORY if files.protocol == "memory" else nullcontext():
            files.pipe_file(path, bytes(data), mode="create")
    except OSError as error:
        # Stores refuse with FileExistsError or, SeaweedFS among them, with a bare EINVAL that may mean other things.
        if not (isinstance(error, FileExistsError) or error.errno == errno.EINVAL) or not files.exists(path):
            raise
        return False
    return True


def remove(files: AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        files.rm_file(path)


def shown(text: str) -> str:
    """A URL or a message without what only its owner should see: passwords, queries of signed URLs, access keys."""
    text = re.sub(r"(?<=://)[^/@\s'\"]+@", "***@", text)
    text = re.sub(r"(?<=://)([^?\s'\"]*)\?[^\s'\"]*", r"\1?***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", name):
            text = text.replace(value, "***")
    return text
