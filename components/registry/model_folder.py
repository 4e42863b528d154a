"""The folder behind a registered version: is it still the one that was registered, and does nothing lead out of it."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from components.digest import digest
from components.registry.mlflow_registry import DIGEST_TAG, Entry, digest_folder
from infra import storage

MANIFEST = "manifest.json"
PIECE = 8 << 20  # bytes read at a time


class Folder(NamedTuple):
    """A checked folder: its URL, the sha256 of each file but the manifest, and the manifest ({} if there is none)."""

    url: str
    files: dict[str, str]
    manifest: dict[str, object]


def checked(entry: Entry, only: str | None = None) -> Folder:
    """The folder of a version, every byte of it read, or of the file `only` and what vouches for it.

    FileNotFoundError if it is gone, ValueError if it was changed.
    """
    said = f"{entry.name}/{entry.version}"
    names = storage.find(entry.url, inside=True)
    if not names:
        raise FileNotFoundError(f"the folder of {said} is gone: {storage.shown(entry.url)}; train and register again")
    for name in names:
        if name.endswith("/") or storage.leads_out(entry.url, name):
            raise ValueError(f"{entry.url}: {name.rstrip('/')} is a link that leads out of the model's folder")
    manifest = storage.read_json(storage.join(entry.url, MANIFEST)) if MANIFEST in names else {}
    listed = manifest_files(manifest, entry.url) if manifest else {}
    looked = [name for name in names if name != MANIFEST and (only in (None, name) or not listed)]
    found = {name: sha256(storage.join(entry.url, name)) for name in looked}
    wanted = {name: value for name, value in listed.items() if only in (None, name)} if listed else found
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    identity = digest(manifest) if listed else digest_folder(entry.url)
    if wrong or identity != entry.tags.get(DIGEST_TAG):
        what = f"{', '.join(wrong[:5])} differ{'s' if len(wrong) == 1 else ''}" if wrong else "its digest differs"
        raise ValueError(
            f"the folder of {said} is not what was registered ({what}): {storage.shown(entry.url)} was changed since. "
            "Remove it, run the chain again, and promote what that registers"
        )
    return Folder(entry.url, found, manifest)


def manifest_files(manifest: object, url: str) -> dict[str, str]:
    """Name -> sha256 of the files that a manifest lists. ValueError for a name that leads out of the folder."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{url}/{MANIFEST} lists no files: it is not the manifest of a model")
    for name in files:
        if storage.join("base", name) != f"base/{name}" or "\\" in name:  # join refuses .. and absolute names itself
            raise ValueError(f"{url}/{MANIFEST} lists {name!r}, which is no plain name below the folder")
    return {str(name): str(value) for name, value in files.items()}


def sha256(url: str) -> str:
    """Of a file's bytes, wherever it lies."""
    total = hashlib.sha256()
    with storage.open_read(url, PIECE) as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return total.hexdigest()
