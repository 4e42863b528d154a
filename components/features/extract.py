"""From one audio shard to its sibling of encoder features: same keys, same order, the same bytes on every run.

A pure function that an actor runs. Two things keep the bytes fixed: batches are planned from the shard's rows and the
kind of device alone (floating point differs a little between batch shapes), and members are written in index order.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from components.digest import digest_file
from components.features.key import device_of, numerics
from components.features.parts import FeaturePart, FeatureRow, finished_part, part_url
from components.features.units import assign
from components.schema import ShardInfo
from components.shards.reader import ShardReader
from components.shards.tar import write_tar
from infra.storage import join, local_copy, scratch, upload, write_bytes
from models.encoders.base import SAMPLE_RATE, AudioEncoder

# The three below decide how floating point rounds: raise FEATURE_VERSION with a change.
BATCH_SECONDS = {"cpu": 32.0, "cuda": 480.0}  # of padded audio; other devices as cuda
PADDING = 0.1  # share of the longest clip in a batch
SLACK = 1.25  # a batch may have this much more frames than its seconds say before it is divided

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One cache that is made: its encoder, its root URL and, for units, the codebook `(clusters, width)`."""

    encoder: AudioEncoder
    root: str
    codebook: Tensor | None = None


def extract_shard(
    shard: ShardInfo,
    rows: Sequence[Row],
    audio_root: str,
    encoder: AudioEncoder,
    feature_root: str,
    codebook: Tensor | None = None,
) -> FeaturePart:
    """Features (bfloat16) or, with a codebook, units (int32) of one audio shard, published beside `feature_root`.

    `rows` are the shard's rows of the index. Returns at once if the part is there and was made from the same audio
    shard. ValueError if the audio is damaged or the encoder breaks its promise on shapes or finite numbers.
    """
    return extract_all(shard, rows, audio_root, [Target(encoder, feature_root, codebook)])[0]


def extract_all(shard: ShardInfo, rows: Sequence[Row], audio_root: str, targets: Sequence[Target]) -> list[FeaturePart]:
    """`extract_shard` for several caches at once: the audio is read and decoded a single time.

    The bytes of each cache are those that it has when it is made alone. The encoders must be on one kind of device.
    """
    parts = [finished_part(shard, target.root) for target in targets]
    todo = [target for target, part in zip(targets, parts, strict=True) if part is None]
    if not todo:
        return [part for part in parts if part is not None]
    with tempfile.TemporaryDirectory(dir=scratch(join(todo[0].root, shard.name)), prefix=f"{shard.name}.") as name:
        made = iter(_extract(shard, rows, audio_root, todo, Path(name)))
        return [part if part is not None else next(made) for part in parts]


def plan_batches(samples: Sequence[int], budget: float) -> list[list[int]]:
    """Indexes of clips in batches of nearly equal length, longest first.

    A batch holds at most `budget` seconds, padding included (or a single longer clip), and no clip in it is padded by
    more than the share `PADDING` of the longest.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: (-samples[i], i)):
        longest = samples[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= budget * SAMPLE_RATE
        if fits and samples[i] >= (1 - PADDING) * longest:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.inference_mode()
def encode_clips(encoder: AudioEncoder, waveforms: list[Tensor]) -> list[Tensor]:
    """Features of one batch as they are cached, each `(frames, width)` float32 on the CPU.

    ValueError if their shape is not the one that `output_length` promises, or a number is not finite.
    """
    device = device_of(encoder)
    found = [frames.float().cpu() for frames in encoder([waveform.to(device) for waveform in waveforms])]
    for frames, waveform in zip(found, waveforms, strict=True):
        expected = (encoder.output_length(len(waveform)), encoder.width)
        if frames.shape != expected:
            raise ValueError(
                f"encoder {encoder.spec.kind} gave features of {tuple(frames.shape)} for {len(waveform)} "
                f"samples where its output_length promises {expected}"
            )
        if not frames.isfinite().all():
            raise ValueError(f"encoder {encoder.spec.kind} gave numbers that are not finite: check its weights")
    return found


def _extract(
    shard: ShardInfo, rows: Sequence[Row], audio_root: str, targets: Sequence[Target], folder: Path
) -> list[FeaturePart]:
    devices = {device_of(target.encoder).type for target in targets}
    if len(devices) > 1:
        raise ValueError(f"encoders that share one pass over the audio are on several kinds of device: {devices}")
    budget = BATCH_SECONDS.get(devices.pop(), BATCH_SECONDS["cuda"])
    reader = _checked_reader(shard, audio_root, folder)
    places: list[list[tuple[int, int]]] = [[(0, 0)] * len(rows) for _ in targets]
    with ExitStack() as stack:
        spools = [stack.enter_context(open(folder / f"spool-{i}", "w+b")) for i in range(len(targets))]
        for batch in plan_batches([int(row["samples"]) for row in rows], budget):
            waveforms = [_waveform(reader, rows[i]) for i in batch]
            for target, spool, place in zip(targets, spools, places, strict=True):
                for i, member in zip(batch, _members(target, waveforms, budget), strict=True):
                    place[i] = (spool.tell(), len(member))
                    spool.write(member)
        return [_publish(shard, rows, *made, folder) for made in zip(targets, spools, places, strict=True)]


def _checked_reader(shard: ShardInfo, audio_root: str, folder: Path) -> ShardReader:
    """Reader of a local copy of the shard whose sha256 is the manifest's."""
    tar = local_copy(join(audio_root, shard.name), folder)
    if digest_file(tar) != shard.sha256:
        raise ValueError(
            f"{join(audio_root, shard.name)} is damaged (its sha256 is not the manifest's): "
            "delete it and run the ingest stage again"
        )
    return ShardReader(str(tar.parent))


def _waveform(reader: ShardReader, row: Row) -> Tensor:
    waveform = torch.from_numpy(reader.waveform(row))
    if len(waveform) != int(row["samples"]):
        raise ValueError(
            f"clip {row['key']} in {row['shard']} has {len(waveform)} samples, the index says "
            f"{row['samples']}: index and shard are from different runs, ingest again"
        )
    return waveform


def _members(target: Target, waveforms: list[Tensor], budget: float) -> Iterator[bytes]:
    """Safetensors bytes of each clip; a batch whose frames are more than its seconds (full windows) is divided."""
    encoder = target.encoder
    step = max(1, int(SLACK * budget / encoder.seconds_of(len(waveforms[0]))))
    for start in range(0, len(waveforms), step):
        for frames in encode_clips(encoder, waveforms[start : start + step]):
            if target.codebook is None:
                yield save({"features": frames.to(torch.bfloat16).contiguous()})
            else:
                yield save({"units": assign(frames, target.codebook)})


def _publish(
    shard: ShardInfo, rows: Sequence[Row], target: Target, spool: BinaryIO, place: list[tuple[int, int]], folder: Path
) -> FeaturePart:
    """Spooled members to the tar in index order, the tar to its place, and the part's record last."""
    checks: list[int] = []

    def members() -> Iterator[tuple[str, bytes]]:
        for row, (start, length) in zip(rows, place, strict=True):
            spool.seek(start)
            data = spool.read(length)
            checks.append(zlib.crc32(data))
            yield f"{row['key']}.safetensors", data

    tar = folder / "features.tar"
    written = write_tar(tar, members())
    found = [
        FeatureRow(
            key=row["key"],
            offset=offset,
            size=length,
            crc32=check,
            frames=target.encoder.output_length(int(row["samples"])),
        )
        for row, (offset, length), check in zip(rows, written.members, checks, strict=True)
    ]
    part = FeaturePart(
        shard=ShardInfo(
            name=shard.name, sha256=written.sha256, bytes=written.bytes, samples=len(rows), seconds=shard.seconds
        ),
        audio_sha256=shard.sha256,
        kind="features" if target.codebook is None else "units",
        width=target.encoder.width if target.codebook is None else len(target.codebook),
        frames=sum(row.frames for row in found),
        numerics=numerics(target.encoder),
        rows=tuple(found),
    )
    upload(tar, join(target.root, shard.name))
    write_bytes(part_url(target.root, shard.name), part.model_dump_json().encode())
    return part
