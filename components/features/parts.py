"""The record of one finished shard of a feature cache: `<feature root>/parts/<shard>.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from components.schema import ShardInfo, Strict
from components.seal import read_sealed, sealed
from infra.storage import exists, join, size, write_bytes

PARTS = "parts"  # folder of the records, beside the tars


class FeatureRow(Strict):
    """Where the features of one clip lie."""

    key: str
    offset: int  # of the safetensors bytes in the tar
    size: int  # bytes
    frames: int
    crc32: int  # of the safetensors bytes


class FeaturePart(Strict):
    """`parts/<shard>.json`: one finished shard of a feature cache."""

    shard: ShardInfo
    audio_sha256: str
    kind: Literal["features", "units"]
    width: int  # of a frame; of units: how many there are
    frames: int
    numerics: dict[str, str]
    rows: tuple[FeatureRow, ...]
    seal: str = ""  # see components/seal.py; empty while it is not a file
    reused: bool = Field(default=False, exclude=True)  # it was there already; never written


def finished_part(shard: ShardInfo, feature_root: str) -> FeaturePart | None:
    """The part of an earlier run if it was made from this very audio shard and its tar is all there."""
    record = part_url(feature_root, shard.name)
    if not exists(record):
        return None
    try:
        part = read_sealed(record, FeaturePart)
    except ValueError:  # damaged, or of another version of this code: the shard is made again, to the same bytes
        return None
    tar = join(feature_root, part.shard.name)
    if part.audio_sha256 != shard.sha256 or not exists(tar) or size(tar) != part.shard.bytes:
        return None
    return part.model_copy(update={"reused": True, "seal": ""})


def write_part(feature_root: str, part: FeaturePart) -> None:
    """Write the record of a shard that has its place, sealed."""
    write_bytes(part_url(feature_root, part.shard.name), sealed(part))


def part_url(feature_root: str, shard: str) -> str:
    """Where the record of `shard-000000.tar` lies."""
    return join(feature_root, PARTS, shard.removesuffix(".tar") + ".json")


def check_parts(feature_root: str, key: dict[str, Any], parts: Sequence[FeaturePart]) -> None:
    """ValueError if a part of a cache was not made as its key says, or two clips have one key."""
    for part in parts:
        if part.numerics != key["numerics"] or part.kind != key["kind"]:
            raise ValueError(
                f"{join(feature_root, part.shard.name)} was made with {part.kind} on {part.numerics}, the "
                f"key says {key['kind']} on {key['numerics']}: {remedy(feature_root, part.shard.name)}"
            )
    keys = [row.key for part in parts for row in part.rows]
    if len(set(keys)) != len(keys):
        raise ValueError(f"keys are not unique in {feature_root}: ingest the audio again")


def remedy(feature_root: str, shard: str) -> str:
    """What to do about a damaged shard."""
    return f"delete {join(feature_root, shard)} and run the cache stage again, only this shard is made anew"
