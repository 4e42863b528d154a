"""An id for each recording, whatever the manifests say."""

from __future__ import annotations

import posixpath

from components.schema import Recording, Reject
from infra import storage


def unique(recordings: list[Recording], root: str, rejects: list[Reject]) -> list[Recording]:
    """Recordings with an id each: a repeated row is set aside, a repeated id gets its folder or a number."""
    kept: list[Recording] = []
    ids: dict[str, int] = {}  # and the number of the latest that wanted it
    first: dict[str, Recording] = {}  # of those that wanted an id
    seen: set[str] = set()  # rows whose id is not theirs alone, as JSON
    for recording in recordings:
        noted = recording.annotation
        earlier = first.setdefault(noted.id, recording)
        if earlier is not recording:
            seen.add(earlier.model_dump_json())
            row = recording.model_dump_json()
            if row in seen:
                path = _relative(recording.url, root)
                rejects.append(Reject(original=path, id=noted.id, reason="the row repeats an earlier one; remove it"))
                continue
            seen.add(row)
        identity = _free(noted.id, posixpath.dirname(_relative(recording.url, root)), ids)
        ids[identity] = 1
        if identity != noted.id:
            recording = recording.model_copy(update={"annotation": noted.model_copy(update={"id": identity})})
        kept.append(recording)
    return kept


def _relative(url: str, root: str) -> str:
    return url.removeprefix(storage.join(root, "")).lstrip("/")


def _free(identity: str, folder: str, taken: dict[str, int]) -> str:
    if identity not in taken:
        return identity
    free = inside = f"{folder}/{identity}" if folder and not identity.startswith(folder + "/") else identity
    while free in taken:
        taken[inside] = taken.get(inside, 1) + 1
        free = f"{inside}-{taken[inside]}"
    return free
