"""The record of one finished shard of a feature cache: `<feature root>/parts/<shard>.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.schema import ShardInfo, Strict
from infra.storage import exists, join, read_json, size

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
    reused: bool = Field(default=False, exclude=True)  # it was there already; never written


def finished_part(shard: ShardInfo, feature_root: str) -> FeaturePart | None:
    """The part of an earlier run if it was made from this very audio shard and its tar is all there."""
    record = part_url(feature_root, shard.name)
    if not exists(record):
        return None
    try:
        part = FeaturePart.model_validate(read_json(record))
    except ValueError:  # damaged: the shard is made again, to the same bytes
        return None
    tar = join(feature_root, part.shard.name)
    if part.audio_sha256 != shard.sha256 or not exists(tar) or size(tar) != part.shard.bytes:
        return None
    return part.model_copy(update={"reused": True})


def part_url(feature_root: str, shard: str) -> str:
    """Where the record of `shard-000000.tar` lies."""
    return join(feature_root, PARTS, shard.removesuffix(".tar") + ".json")
