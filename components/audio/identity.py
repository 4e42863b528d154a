"""What a file is known by: of a local one BLAKE3 of its bytes, or sha256 of what a FLAC that is believed declares.

BLAKE3, because ingest digests a file when it lists it and again when it reads it; SHA-256 takes four times as long.
"""

from __future__ import annotations

from blake3 import blake3

from components.audio.headers import flac_md5
from components.digest import digest_bytes
from infra import storage

KIND = "blake3:"
HEAD = 42  # bytes up to the end of a FLAC's first block


def digest_at(url: str, trust: bool = False) -> str:
    """What the file is known by, see Recording.digest; OSError if it cannot be read.

    With `trust` a local FLAC is known by its length and the MD5 of its samples that its header declares, so that a
    folder of terabytes is listed without being read.
    """
    if trust and storage.is_local(url):
        size = storage.size(url)
        known = _declared(storage.read_range(url, 0, HEAD), size)
        if known is not None:
            return known
    known = storage.fingerprint(url, blake3)
    return f"{KIND}{known}" if storage.is_local(url) else known


def digest_of(data: bytes | memoryview) -> str:
    """What `digest_at` says of a local file, or a listing of a part of one, with these bytes."""
    return f"{KIND}{blake3(data).hexdigest()}"


def has_digest(data: bytes, expected: str, trust: bool = False) -> bool:
    """Whether a local file with these bytes is the one that `digest_at` knew as `expected`."""
    return (trust and _declared(data, len(data)) == expected) or digest_of(data) == expected


def _declared(head: bytes, size: int) -> str | None:
    md5 = flac_md5(head)
    return digest_bytes(f"flac {md5} {size}".encode()) if md5 else None
