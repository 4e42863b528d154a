"""Principal components of an encoder's frames, fitted once on clips of the train split.

That encoder frames lie near a subspace is LiteASR's observation (arXiv 2502.20583) on Whisper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.digest import digest
from components.features.compact import Projection
from components.features.extract import BATCH_SECONDS, encode_clips, plan_batches, read_waveform
from components.features.fitted import publish_fitted
from components.features.key import feature_key, fingerprint
from components.features.overlap import ahead
from components.features.projection import FILES, INPUTS, ProjectionManifest
from components.shards.reader import ShardReader
from infra.storage import join
from models.encoders.base import AudioEncoder

PROJECTION_VERSION = 1  # raise it when fit_components may give other components for the same clips
WIDEST = 4096  # numbers in a frame: the matrix of products is 134 MB

Row = Mapping[str, Any]


class Moments(NamedTuple):
    """Number of frames, their sum `(width,)` and the sum of their products `(width, width)`, both float64."""

    frames: int
    total: Tensor
    products: Tensor


def fit_projection(
    encoder: AudioEncoder,
    rows: Sequence[Row],
    audio_root: str,
    audio_digest: str,
    dims: int,
    root_url: str,
    seed: int = 0,
    max_frames: int = 65_536,
) -> tuple[str, str]:
    """Fit components on clips drawn by `seed`, publish them at `<root_url>/projections/<digest>/` → URL and digest.

    `rows` are those of the train split (their order does not matter); whole clips are encoded until `max_frames` are
    there. The digest names the inputs, so components that are there are returned at once. ValueError if there are no
    clips, or `dims` is not below the width of a frame.
    """
    keys = [str(row["key"]) for row in rows]
    if not keys:
        raise ValueError(f"no clips to fit principal components on: is there a train split in {audio_root}?")
    if not 0 < dims < encoder.width <= WIDEST:
        raise ValueError(
            f"{dims} principal components of frames with {encoder.width} numbers: there must be fewer of them than "
            f"numbers, and at most {WIDEST} numbers; choose fewer, or features=int8"
        )
    features = fingerprint(feature_key(encoder))
    named = (features, audio_digest, digest(sorted(keys)), dims, seed, max_frames, PROJECTION_VERSION)
    inputs = dict(zip(INPUTS, named, strict=True))

    def fit() -> tuple[dict[str, Tensor], dict[str, Any]]:
        moments = gather_moments(encoder, draw_rows(encoder, rows, keys, max_frames, seed), audio_root)
        projection, explained = fit_components(moments, dims)
        return projection._asdict(), {"width": encoder.width, "frames": moments.frames, "explained": explained}

    return publish_fitted(join(root_url, "projections"), FILES, ProjectionManifest, inputs, fit)


def draw_rows(encoder: AudioEncoder, rows: Sequence[Row], keys: list[str], max_frames: int, seed: int) -> list[Row]:
    """Rows of whole clips in an order drawn by `seed`, until `max_frames` are there; `keys` are those of all rows."""
    by_key = sorted(range(len(keys)), key=keys.__getitem__)
    chosen: list[Row] = []
    total = 0
    for i in torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist():
        if total >= max_frames:
            break
        chosen.append(rows[by_key[i]])
        total += encoder.output_length(int(chosen[-1]["samples"]))
    return chosen


def gather_moments(encoder: AudioEncoder, rows: Sequence[Row], audio_root: str) -> Moments:
    """Moments of the frames of clips, which are encoded batch by batch and not kept."""
    budget = BATCH_SECONDS.get(encoder.device.type, BATCH_SECONDS["cuda"])
    batches = [[rows[i] for i in batch] for batch in plan_batches([int(row["samples"]) for row in rows], budget)]
    count = 0
    total = torch.zeros(encoder.width, dtype=torch.float64)
    products = torch.zeros(encoder.width, encoder.width, dtype=torch.float64)
    with closing(ahead(partial(read_waveform, ShardReader(audio_root, whole_shards=True)), batches)) as clips:
        for waveforms in clips:
            frames = torch.cat(encode_clips(encoder, waveforms)).double()
            count += len(frames)
            total += frames.sum(0)
            products.addmm_(frames.T, frames)
    return Moments(count, total, products)


def fit_components(moments: Moments, dims: int) -> tuple[Projection, float]:
    """The `dims` directions of most variance and the share of it that they hold.

    Of the two signs of a component the one is taken whose largest entry is positive.
    """
    mean = moments.total / moments.frames
    variances, vectors = torch.linalg.eigh(moments.products / moments.frames - torch.outer(mean, mean))
    basis = vectors.T.flip(0)[:dims]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    explained = variances.clamp_min(0).flip(0)[:dims].sum() / variances.clamp_min(0).sum().clamp_min(1e-300)
    return Projection((basis * largest.sign()).float().contiguous(), mean.float()), float(explained)
