"""From one audio shard to its sibling of encoder features: same keys, same order, the same bytes on every run.

A pure function that an actor runs. Two things keep the bytes fixed: batches are planned from the shard's rows and the
kind of device alone (floating point differs a little between batch shapes), and members are written in index order.
The encoder is fed by threads that decode ahead of it, and leaves its results to one that writes them.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from components.features.compact import Projection, pack
from components.features.form import BF16, Form
from components.features.key import numerics
from components.features.overlap import Behind, ahead
from components.features.parts import FeaturePart, FeatureRow, finished_part, write_part
from components.features.reuse import remember, taken_over
from components.features.units import assign
from components.schema import ShardInfo
from components.shards.reader import ShardReader, refuse_damaged
from components.shards.tar import write_tar
from infra.shard_cache import cached_copy
from infra.storage import join, scratch, upload
from models.encoders.base import SAMPLE_RATE, AudioEncoder

# The three below decide how floating point rounds: raise FEATURE_VERSION with a change.
BATCH_SECONDS = {"cpu": 32.0, "cuda": 480.0}  # of padded audio; other devices as cuda
PADDING = 0.1  # share of the longest clip in a batch
SLACK = 1.25  # a batch may have this much more frames than its seconds say before it is divided

DECODERS = {"cpu": 1, "cuda": 4}  # threads that decode; other devices as cuda

Row = Mapping[str, Any]
Places = list[tuple[int, int]]  # of members in a spool: (offset, size)


@dataclass(frozen=True)
class Target:
    """One cache that is made."""

    encoder: AudioEncoder
    root: str  # URL
    codebook: Tensor | None = None  # (clusters, width): units are stored, not features
    form: Form = BF16
    projection: Projection | None = None  # that the form needs
    folder: str | None = None  # of the fingerprint, below which versions with the same shards may be (reuse.py)

    def at_encoder(self) -> Target:
        """The same, with the components on the device that the frames are on."""
        return self if self.projection is None else replace(self, projection=self.projection.to(self.encoder.device))


@dataclass(frozen=True)
class Started:
    """Results of some clips of one target on their way to the host; `wait` before they are read."""

    clips: list[dict[str, Tensor]]
    finite: Tensor  # (clips,) bool
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def extract_shard(
    shard: ShardInfo,
    rows: Sequence[Row],
    audio_root: str,
    encoder: AudioEncoder,
    feature_root: str,
    codebook: Tensor | None = None,
    form: Form = BF16,
    projection: Projection | None = None,
) -> FeaturePart:
    """Features in that form or, with a codebook, units (int32) of one audio shard, published beside `feature_root`.

    `rows` are the shard's rows of the index. Returns at once if the part is there and was made from the same audio
    shard. ValueError if the audio is damaged or the encoder breaks its promise on shapes or finite numbers.
    """
    target = Target(encoder, feature_root, codebook, form, projection)
    return extract_all(shard, rows, audio_root, [target])[0]


def extract_all(shard: ShardInfo, rows: Sequence[Row], audio_root: str, targets: Sequence[Target]) -> list[FeaturePart]:
    """`extract_shard` for several caches at once: the audio is read and decoded a single time.

    The bytes of each cache are those that it has when it is made alone. The encoders must be on one kind of device.
    """
    parts = [finished_part(shard, target.root) or _taken_over(shard, target) for target in targets]
    todo = [target.at_encoder() for target, part in zip(targets, parts, strict=True) if part is None]
    if not todo:
        return [part for part in parts if part is not None]
    with tempfile.TemporaryDirectory(dir=scratch(join(todo[0].root, shard.name)), prefix=f"{shard.name}.") as name:
        made = iter(_extract(shard, rows, audio_root, todo, Path(name)))
        return [part or next(made) for part in parts]


def _taken_over(shard: ShardInfo, target: Target) -> FeaturePart | None:
    return taken_over(target.folder, target.root, shard) if target.folder is not None else None


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
    """Features of one batch before they are stored, each `(frames, width)` float32 on the CPU.

    ValueError if their shape is not the one that `output_length` promises, or a number is not finite.
    """
    found = _encoded(encoder, waveforms)
    _refuse_infinite(encoder, _finite(found))
    return [frames.cpu() for frames in found]


@torch.inference_mode()
def start(target: Target, waveforms: list[Tensor]) -> Started:
    """Encode a batch for one cache, without waiting for a CUDA device: results are copied while it goes on."""
    found = _encoded(target.encoder, waveforms)
    if target.codebook is None:
        stored = [pack(frames, target.form, target.projection) for frames in found]
    else:
        stored = [{"frames": frames} for frames in found]
    clips = [{name: _to_host(tensor) for name, tensor in tensors.items()} for tensors in stored]
    finite = _to_host(_finite(found))
    copied = None
    if found[0].is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return Started(clips, finite, copied)


def read_waveform(reader: ShardReader, row: Row, pinned: bool = False) -> Tensor:
    """Audio `(samples,)` of a clip, `pinned` where a CUDA device will copy it; ValueError if it is not the index's."""
    waveform = torch.from_numpy(reader.waveform(row))
    if len(waveform) != int(row["samples"]):
        raise ValueError(
            f"clip {row['key']} in {row['shard']} has {len(waveform)} samples, the index says "
            f"{row['samples']}: index and shard are from different runs, ingest again"
        )
    return waveform.pin_memory() if pinned else waveform


def _extract(
    shard: ShardInfo, rows: Sequence[Row], audio_root: str, targets: Sequence[Target], folder: Path
) -> list[FeaturePart]:
    devices = {target.encoder.device.type for target in targets}
    if len(devices) > 1:
        raise ValueError(f"encoders that share one pass over the audio are on several kinds of device: {devices}")
    device = devices.pop()
    budget = BATCH_SECONDS.get(device, BATCH_SECONDS["cuda"])
    read = partial(read_waveform, ShardReader(str(folder)), pinned=device == "cuda")
    batches = plan_batches([int(row["samples"]) for row in rows], budget)
    places: list[Places] = [[(0, 0)] * len(rows) for _ in targets]
    with ExitStack() as stack:
        tar = folder / shard.name
        tar.symlink_to(
            stack.enter_context(cached_copy(join(audio_root, shard.name), shard.sha256, shard.bytes)).resolve()
        )
        spools = [stack.enter_context(open(folder / f"spool-{i}", "w+b")) for i in range(len(targets))]
        decoded = ahead(read, [[rows[i] for i in batch] for batch in batches], DECODERS.get(device, DECODERS["cuda"]))
        try:
            with Behind() as behind, closing(decoded):
                behind.put(partial(refuse_damaged, tar, shard, audio_root))
                for batch, waveforms in zip(batches, decoded, strict=True):
                    for target, spool, place in zip(targets, spools, places, strict=True):
                        for part in _divided(target.encoder, batch, [len(waveform) for waveform in waveforms], budget):
                            begun = start(target, waveforms[part])
                            behind.put(partial(_spool, target, begun, spool, place, batch[part]))
        except ValueError:
            refuse_damaged(tar, shard, audio_root)  # if that is the reason, it is the one to tell
            raise
        return [_publish(shard, rows, *made, folder) for made in zip(targets, spools, places, strict=True)]


def _divided(encoder: AudioEncoder, batch: Sequence[int], samples: Sequence[int], budget: float) -> Iterator[slice]:
    """A batch whole, or in parts if its frames are more than its seconds say (full windows)."""
    step = max(1, int(SLACK * budget / encoder.seconds_of(samples[0])))
    for begin in range(0, len(batch), step):
        yield slice(begin, begin + step)


def _encoded(encoder: AudioEncoder, waveforms: list[Tensor]) -> list[Tensor]:
    """Frames `(frames, width)` float32 of each clip, on the encoder's device; ValueError for other shapes."""
    device = encoder.device
    found = [frames.float() for frames in encoder([w.to(device, non_blocking=True) for w in waveforms])]
    for frames, waveform in zip(found, waveforms, strict=True):
        expected = (encoder.output_length(len(waveform)), encoder.width)
        if frames.shape != expected:
            raise ValueError(
                f"encoder {encoder.spec.kind} gave features of {tuple(frames.shape)} for {len(waveform)} "
                f"samples where its output_length promises {expected}"
            )
    return found


def _finite(found: list[Tensor]) -> Tensor:
    return torch.stack([frames.isfinite().all() for frames in found])


def _refuse_infinite(encoder: AudioEncoder, finite: Tensor) -> None:
    if not finite.all():
        raise ValueError(f"encoder {encoder.spec.kind} gave numbers that are not finite: check its weights")


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy in pinned memory that a CUDA device will have made when it comes to it."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _spool(target: Target, begun: Started, spool: BinaryIO, place: Places, batch: Sequence[int]) -> None:
    """Write the safetensors bytes of clips behind what the spool holds, and note where."""
    begun.wait()
    _refuse_infinite(target.encoder, begun.finite)
    for i, tensors in zip(batch, begun.clips, strict=True):
        if target.codebook is not None:
            tensors = {"units": assign(tensors["frames"], target.codebook)}
        place[i] = (spool.tell(), spool.write(save(tensors)))


def _publish(
    shard: ShardInfo, rows: Sequence[Row], target: Target, spool: BinaryIO, place: Places, folder: Path
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
    if target.folder is not None:
        remember(target.folder, target.root, part)
    write_part(target.root, part)
    return part
