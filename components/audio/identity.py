"""What a file is known by: of a local one the sha256 of its bytes, or of what a FLAC that is believed declares."""

from __future__ import annotations

from components.audio.headers import flac_md5
from components.digest import digest_bytes
from infra import storage

HEAD = 42  # bytes up to the end of a FLAC's first block


def digest_at(url: str, trust: bool = False) -> str:
    """sha256 by which the file is known, see Recording.digest; OSError if it cannot be read.

    With `trust` a local FLAC is known by its length and the MD5 of its samples that its header declares, so that a
    folder of terabytes is listed without being read.
    """
    if trust and storage.is_local(url):
        size = storage.size(url)
        known = _declared(storage.read_range(url, 0, HEAD), size)
        if known is not None:
            return known
    return storage.fingerprint(url)


def has_digest(data: bytes, expected: str, trust: bool = False) -> bool:
    """Whether a local file with these bytes is the one that `digest_at` knew as `expected`."""
    return (trust and _declared(data, len(data)) == expected) or digest_bytes(data) == expected


def _declared(head: bytes, size: int) -> str | None:
    md5 = flac_md5(head)
    return digest_bytes(f"flac {md5} {size}".encode()) if md5 else None
