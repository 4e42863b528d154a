"""The record of one finished group: `<audio root>/parts/shard-000000.json`, by which a killed ingest is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from components.digest import digest
from components.schema import SCHEMA_VERSION, Reject, ShardInfo, Strict
from components.shards.group import Keyed, original_name
from components.shards.index import SampleRow
from infra.storage import exists, join, read_json, size

PARTS = "parts"  # folder of the records, beside the tars
INGEST_VERSION = 1  # raise it when the same recording would give other bytes


class Part(Strict):
    """What came of one group of recordings."""

    schema_version: int = SCHEMA_VERSION
    ingest_version: int = INGEST_VERSION
    inputs: str  # digest of the group
    shard: ShardInfo | None  # None if every recording of the group was set aside
    rows: tuple[SampleRow, ...]
    rejects: tuple[Reject, ...]
    sources: dict[str, int]  # clips by what their annotation says
    licences: dict[str, int]


def shard_name(group_index: int) -> str:
    return f"shard-{group_index:06d}.tar"


def part_url(root_url: str, group_index: int) -> str:
    return join(root_url, PARTS, f"shard-{group_index:06d}.json")


def group_digest(group: Sequence[Keyed], data_url: str) -> str:
    """Digest of all that decides the bytes of a shard; where the data lie does not."""
    total = hashlib.sha256(f"{SCHEMA_VERSION} {INGEST_VERSION}\n".encode())
    for key, recording in group:
        noted = recording.annotation.model_dump(mode="json")
        item = [key, original_name(recording.url, data_url), recording.digest, noted]
        total.update(digest(item).encode())
    return total.hexdigest()


def finished_part(root_url: str, group_index: int, inputs: str) -> Part | None:
    """The part of an earlier run if it was made from the same group and its tar is all there, else None."""
    url = part_url(root_url, group_index)
    if not exists(url):
        return None
    try:
        part = Part.model_validate(read_json(url))
    except ValueError:
        return None  # of another version of this code: made anew
    if part.inputs != inputs:
        return None
    if part.shard is not None:
        tar = join(root_url, part.shard.name)
        if not exists(tar) or size(tar) != part.shard.bytes:
            return None
    return part
