"""Feature shards that another version of a data set has already: `<fingerprint folder>/known/<audio sha256>.json`.

A data set to which files are added becomes a new version; audio shards that it shares with another one are not encoded
again. The fingerprint stands for all else that decides the bytes, the sha256 of the audio shard for the clips in it.
"""

from __future__ import annotations

from components.features.parts import FeaturePart, finished_part, write_part
from components.schema import ShardInfo, Strict
from components.seal import read_sealed, sealed
from components.shards.reuse import copied
from infra.storage import join, write_bytes

KNOWN = "known"


class Known(Strict):
    """Where the features of an audio shard are."""

    place: str  # <dataset>/<version>
    shard: str  # name
    seal: str = ""  # see components/seal.py


def remember(folder: str, feature_root: str, part: FeaturePart) -> None:
    """Note below the fingerprint's folder that the cache at `feature_root` has a shard, before its record is there."""
    known = Known(place=feature_root.removeprefix(folder).strip("/"), shard=part.shard.name)
    write_bytes(_note(folder, part.audio_sha256), sealed(known))


def taken_over(folder: str, feature_root: str, shard: ShardInfo) -> FeaturePart | None:
    """The part of an audio shard that another cache of this fingerprint has, copied here and checked by its sha256.

    None if none has it whole.
    """
    try:
        known = read_sealed(_note(folder, shard.sha256), Known)
        other = join(folder, known.place)
        part = finished_part(shard.model_copy(update={"name": known.shard}), other)
    except (FileNotFoundError, ValueError):  # none, a damaged note, or removed in the meantime: made anew here
        return None
    if part is None or not copied(join(other, known.shard), part.shard.sha256, join(feature_root, shard.name)):
        return None
    part = part.model_copy(update={"shard": part.shard.model_copy(update={"name": shard.name})})
    write_part(feature_root, part)
    return part


def _note(folder: str, audio_sha256: str) -> str:
    return join(folder, KNOWN, f"{audio_sha256}.json")
