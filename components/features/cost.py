"""What a feature cache will cost, from the index alone and before anything runs, and what it took in the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import torch

from components.features.form import BF16, Form
from components.features.parts import PARTS
from components.features.store import FeatureStore
from infra.storage import join, list_names
from infra.units import volume
from models.encoders.base import SAMPLE_RATE, AudioEncoder

MEMBER_OVERHEAD = 512 + 88 + 256  # bytes: tar header, safetensors header, half a block of padding on average
SCALE_OVERHEAD = 72  # bytes: what a second tensor adds to the safetensors header
UNIT_BYTES = 4

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """Size and work of a cache; `str` is the line that is printed before the work starts."""

    clips: int
    frames: int
    bytes: int  # of the whole cache
    hours: float  # of audio, in all
    shards_there: int
    shards_missing: int
    hours_missing: float  # of audio that has still to be encoded
    speed: float | None = None  # seconds of audio encoded per second, where it was measured

    def __str__(self) -> str:
        shards = self.shards_there + self.shards_missing
        line = (
            f"{self.clips:,} clips, {self.hours:.2f} h of audio: {self.frames:,} frames, {volume(self.bytes)}; "
            f"{self.shards_there} of {shards} shards are there"
        )
        if not self.shards_missing:
            return line + ", nothing to do"
        line += f", {self.hours_missing:.2f} h of audio to encode"
        if self.speed:
            line += f" (about {60 * self.hours_missing / self.speed:.1f} min at {self.speed:.0f} x real time)"
        return line


def estimate(
    index: pa.Table | Iterable[Row],
    encoder: AudioEncoder,
    feature_root: str,
    units: bool = False,
    speed: float | None = None,
    form: Form = BF16,
) -> Cost:
    """Cost of the cache of an audio data set, without running the encoder.

    `index` is the table of `components.shards.index.read_index` or rows with `shard` and `samples`;
    `units` says that codebook units are stored instead of features; `speed` is that of `measure_speed`; `form` is how
    features are stored.
    """
    rows = list(_rows(index))
    there = {name.removesuffix(".json") for name in list_names(join(feature_root, PARTS)) if name.endswith(".json")}
    shards = {str(row["shard"]) for row in rows}
    missing = {shard for shard in shards if shard.removesuffix(".tar") not in there}
    lengths = {samples: encoder.output_length(samples) for samples in {int(row["samples"]) for row in rows}}
    frames = sum(lengths[int(row["samples"])] for row in rows)
    stored = {n: UNIT_BYTES * n if units else form.clip_bytes(n, encoder.width) for n in set(lengths.values())}
    overhead = MEMBER_OVERHEAD + SCALE_OVERHEAD * (not units and form.dtype == "int8")
    return Cost(
        clips=len(rows),
        frames=frames,
        bytes=sum(stored[lengths[int(row["samples"])]] for row in rows) + len(rows) * overhead,
        hours=sum(int(row["samples"]) for row in rows) / SAMPLE_RATE / 3600,
        shards_there=len(shards) - len(missing),
        shards_missing=len(missing),
        hours_missing=sum(int(row["samples"]) for row in rows if row["shard"] in missing) / SAMPLE_RATE / 3600,
        speed=speed,
    )


@dataclass(frozen=True)
class Account:
    """What a finished cache takes, to the byte; `str` is the line that is printed after the work."""

    clips: int
    frames: int
    bytes: int  # of all its shards
    payload: int  # of these, bytes of safetensors; a clip's own are `FeatureStore.place(key).size`
    hours: float  # of audio

    @property
    def hourly(self) -> float:
        """Bytes of shards for an hour of audio."""
        return self.bytes / self.hours if self.hours else 0.0

    def __str__(self) -> str:
        return f"{self.frames:,} frames, {volume(self.bytes)}, {volume(self.hourly)} an hour of audio"


def account(store: FeatureStore) -> Account:
    """Exact bytes of a finished cache, from its manifest and index."""
    manifest = store.manifest
    return Account(
        clips=manifest.samples,
        frames=manifest.frames,
        bytes=sum(shard.bytes for shard in manifest.shards),
        payload=sum(place.size for place in store.places.values()),
        hours=sum(shard.seconds for shard in manifest.shards) / 3600,
    )


def measure_speed(encoder: AudioEncoder, seconds: float = 4.0, clips: int = 4) -> float:
    """Seconds of audio encoded per second on this machine: one batch to warm up, one that is timed."""
    batch = [torch.zeros(int(seconds * SAMPLE_RATE), device=encoder.device) for _ in range(clips)]
    with torch.inference_mode():
        encoder(batch)
        start = time.perf_counter()
        float(encoder(batch)[0].sum())  # the sum waits for an asynchronous device
    return seconds * clips / (time.perf_counter() - start)


def _rows(index: pa.Table | Iterable[Row]) -> Iterable[Row]:
    if isinstance(index, pa.Table):
        return cast(list[Row], index.select(["shard", "samples"]).to_pylist())
    return index
