"""Files inside installed wheels, found without importing the packages, and small JSON files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file of an installed package: import name of the package, path inside it, sha256 of the bytes it must have."""

    package: str
    path: str
    sha256: str


def locate(source: Source) -> Path | None:
    """Where the file is; None if the package is not installed or lacks it. The package is not imported."""
    spec = importlib.util.find_spec(source.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / source.path
        if path.is_file():
            return path
    return None


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Sorted and indented, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
