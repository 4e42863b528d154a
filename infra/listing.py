"""Files of a folder with their sizes and times, for whoever has to know what takes room and how old it is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from infra import disk, stores
from infra.storage import exists, is_local, local_path

TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")  # as file systems call it


def files_below(url: str) -> Iterator[tuple[str, int, float]]:
    """Files below a folder: name relative to it, bytes, and the time of their last change in seconds since 1970."""
    if is_local(url):
        for name in disk.walk(Path(local_path(url))):
            with suppress(FileNotFoundError):  # removed in the meantime
                status = (local_path(url) / name).stat()
                yield name, status.st_size, status.st_mtime
        return
    found = stores.attempt(url, lambda files, path: (path, files.find(path, detail=True))) if exists(url) else ("", {})
    for name, info in found[1].items():
        yield str(name)[len(found[0]) :].lstrip("/"), int(info.get("size") or 0), _time(info)


def _time(info: Mapping[str, Any]) -> float:
    """What a store says of when a file was written; now if it says nothing, so that the file counts as in use."""
    said = next((info[name] for name in TIMES if info.get(name) is not None), None)
    if isinstance(said, str):
        said = datetime.fromisoformat(said)
    return said.timestamp() if isinstance(said, datetime) else float(said or time.time())
