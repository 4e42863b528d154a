"""The record of one finished group: `<audio root>/parts/shard-000000.json`, by which a killed ingest is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from components.audio.fingerprint import VERSION as FINGERPRINT_VERSION
from components.digest import digest
from components.schema import SCHEMA_VERSION, Recording, Reject, ShardInfo, Strict
from components.seal import read_sealed
from components.shards.group import Keyed, original_name
from components.shards.index import SampleRow
from components.shards.settings import Ingest
from infra.storage import has_size, join

PARTS = "parts"  # folder of the records, beside the tars
INGEST_VERSION = 3  # raise it when the same recording would give other bytes
OF_THE_WHOLE = {"duplicates", "leaks", "leak_speakers", "leak_sentences"}  # settings that no single shard depends on


class Part(Strict):
    """What came of one group of recordings."""

    schema_version: int = SCHEMA_VERSION
    ingest_version: int = INGEST_VERSION
    inputs: str  # digest of the group
    shard: ShardInfo | None  # None if every recording of the group was set aside
    rows: tuple[SampleRow, ...]
    rows_digest: str = ""  # see digest_of_rows; worked out beside the decoding, not by the one process that publishes
    rejects: tuple[Reject, ...]
    sources: dict[str, int]  # clips by what their annotation says
    licences: dict[str, int]
    seal: str = ""  # see components/seal.py


def shard_name(group_index: int) -> str:
    return f"shard-{group_index:06d}.tar"


def part_url(root_url: str, group_index: int) -> str:
    return join(root_url, PARTS, f"shard-{group_index:06d}.json")


def group_digest(group: Sequence[Keyed], data_url: str, settings: Ingest) -> str:
    """Digest of all that decides the bytes of a shard; where the data lie does not."""
    steps = settings.model_dump(mode="json", exclude=OF_THE_WHOLE)
    steps["fingerprints"] = FINGERPRINT_VERSION if settings.fingerprints else None
    total = hashlib.sha256(digest([SCHEMA_VERSION, INGEST_VERSION, steps]).encode())
    for key, recording in group:
        total.update(digest([key, *identity_of(recording, data_url)]).encode())
    return total.hexdigest()


def identity_of(recording: Recording, data_url: str) -> list[object]:
    """What a recording is, wherever it lies: a JSON value to digest."""
    place = [recording.start, recording.duration, recording.inside]
    noted = recording.annotation.model_dump(mode="json")
    beside = [[one.kind, original_name(one.url, data_url), one.inside, one.digest] for one in recording.media]
    return [original_name(recording.url, data_url), recording.digest, place, noted, *beside]


def digest_of_rows(rows: Sequence[SampleRow]) -> str:
    return digest([row.model_dump() for row in rows])


def finished_part(root_url: str, group_index: int, inputs: str) -> Part | None:
    """The part of an earlier run if it was made from the same group and its tar is all there, else None."""
    try:
        part = read_sealed(part_url(root_url, group_index), Part)
    except (FileNotFoundError, ValueError):
        return None  # not there, or damaged or of another version of this code: made anew
    if part.inputs != inputs:
        return None
    if part.shard is not None and not has_size(join(root_url, part.shard.name), part.shard.bytes):
        return None
    return part
