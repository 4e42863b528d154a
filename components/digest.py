"""Digests: one canonical way from a value, a file or a list of files to sha256 in hex."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of a JSON value; the order of dictionary keys does not matter."""
    return hashlib.sha256(CANONICAL.encode(value).encode()).hexdigest()


def digest_bytes(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
