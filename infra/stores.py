"""Object stores and other machines: calls that are tried again and end in time, refusals that tell no secret."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

from infra import s3
from infra.secrets import redacted as shown

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

# Seconds between the tries of a call, each times a random 0.5 to 1.5: an outage of half a minute passes. Most faults
# are of one request and not of the store, so the first tries follow soon: at half a second, a fault in ten requests
# would cost more than to make a small shard does.
WAITS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0)
LIMIT = 120.0  # seconds after which no further try of a call begins
CONNECT = 5.0  # seconds in which a connection stands
SILENCE = 20.0  # seconds in which a server says something

# File systems that remember listings, which other processes make wrong.
LISTED = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "http", "https")
S3 = ("s3", "s3a")


class WrongBytes(OSError):
    """What came is not what the store says it holds."""


class Replaced(OSError):
    """The file is no longer the one that was asked for: its checksum in the store has changed."""


PERMANENT: tuple[type[Exception], ...] = (
    *(Replaced, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ValueError, TypeError, AttributeError, LookupError, ImportError),
)


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL with all our settings, and the path in it, for libraries that write by themselves.

    It tries again by itself, for they do not.
    """
    kind, options = _found(url)
    return kind(**options | (s3.options({}) if url.partition("://")[0] in S3 else {})), _path(kind, url)


def _remote(url: str) -> tuple[AbstractFileSystem, str]:
    kind, options = _found(url)
    if url.partition("://")[0] not in S3:
        return kind(**options), _path(kind, url)
    files = kind(**options | s3.options(_patience()))
    files.retries = 1
    return files, _path(kind, url)


def _found(url: str) -> tuple[type[AbstractFileSystem], dict[str, Any]]:
    """The class of a URL's file system, and its arguments."""
    import fsspec  # here, as all of it: a lake in a folder does without

    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown(url)} cannot be opened ({error}): install that package or correct the URL") from None
    found = cast(dict[str, Any], kind._get_kwargs_from_urls(url))
    return kind, found | ({"use_listings_cache": False} if protocol in LISTED else {})


def _path(kind: type[AbstractFileSystem], url: str) -> str:
    return str(kind._strip_protocol(url)).rstrip("/")


def _patience() -> dict[str, Any]:
    """How long an S3 client waits. It tries once: `attempt` is the one place where calls are tried again.

    With the tries of botocore (5) and of s3fs (5) inside ours, a server that never answers would hold us for an hour.
    """
    limits = {"connect_timeout": CONNECT, "read_timeout": SILENCE, "max_pool_connections": 64}
    return limits | {"retries": {"total_max_attempts": 1}}


def attempt(url: str, action: Callable[[AbstractFileSystem, str], T]) -> T:
    """`action` on the file system and path of a URL, again after a while if the reason may pass.

    Raises OSError that names the URL and the remedy when `WAITS` or `LIMIT` is used up. `action` has time limits of
    its own (`CONNECT`, `SILENCE`), so that the whole ends within `LIMIT` and one call.
    """
    files, path = _remote(url)
    end = time.monotonic() + LIMIT
    for wait in (*WAITS, None):
        try:
            return action(files, path)
        except PERMANENT as error:
            kind = next(kind for kind in PERMANENT if isinstance(error, kind))
            raise kind(f"{shown(url)}: {shown(str(error)) or kind.__name__}") from None
        except Exception as error:  # noqa: BLE001 each store has exceptions of its own, and no common base
            pause = None if wait is None else wait * (0.5 + random.random())
            if pause is None or time.monotonic() + pause > end or "Credential" in type(error).__name__:
                raise _refusal(url, error) from None
            time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def _refusal(url: str, error: Exception) -> OSError:
    if isinstance(error, WrongBytes):
        return WrongBytes(
            f"{shown(url)}: {shown(str(error))}, at every try: check what lies between here and the store, "
            "or remove the file and run its stage again"
        )
    return OSError(
        f"{shown(url)} cannot be reached ({type(error).__name__}: {shown(str(error))}): "
        "check the network, the endpoint and the credentials"
    )


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


def remove(files: AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):
        files.rm_file(path)
