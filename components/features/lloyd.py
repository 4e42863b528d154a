"""k-means over all frames of a cache, shard by shard: each worker gives sums, nobody holds all frames.

A pass is one of Lloyd's steps, exact: what comes of it depends on the shards and on the centres before it, as sums are
float64 and are added in the order of the shards, however many workers there are (each with one thread of torch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from components.features.store import FeatureStore
from components.features.units import (
    CHUNK,
    find_nearest,
    fit_codebook,
    gather_frames,
    published_once,
    unit_inputs,
)


class Sums(NamedTuple):
    """What one shard says about the centres; small, whatever the shard holds."""

    sums: Tensor  # (clusters, width) float64, of the frames that are nearest to each centre
    counts: Tensor  # (clusters,) int64
    distortion: float  # sum of squared distances
    farthest: Tensor  # (width,) float32: the frame that lies farthest from its centre
    distance: float  # squared, of that frame


Sweep = Callable[[Tensor], Iterable[Sums]]  # what each shard says about these centres, in the order of the shards
Sweeper = Callable[[FeatureStore, list[list[str]]], AbstractContextManager[Sweep]]  # over the keys of each shard


@contextmanager
def in_turn(store: FeatureStore, pieces: list[list[str]]) -> Iterator[Sweep]:
    """A sweep in this process, shard after shard; the pipeline's is on Ray."""
    yield lambda centres: (shard_sums(store, centres, keys) for keys in pieces)


def fit_units(
    store: FeatureStore,
    keys: Iterable[str],
    clusters: int,
    seed: int,
    root_url: str,
    sweeper: Sweeper = in_turn,
    passes: int = 10,
    max_frames: int = 200_000,
    iterations: int = 25,
) -> tuple[str, str]:
    """Fit a codebook on cached features and publish it at `<root_url>/units/<digest>/` → its URL and digest.

    `keys` are the clips of the train split (their order does not matter). It starts from `fit_codebook` on whole clips
    with `max_frames`, drawn by `seed`; then come `passes` over all frames, fewer if no mean moves. The digest names the
    inputs, not the workers, so it is known before the work: a codebook that is there is returned at once. ValueError
    if `keys` is empty, a key is missing, or there are fewer frames than clusters.
    """
    names = sorted(set(keys))

    def fit() -> tuple[Tensor, int]:
        centres = fit_codebook(gather_frames(store, names, max_frames, seed), clusters, seed, iterations)
        with sweeper(store, by_shard(store, names)) as sweep:
            for _ in range(passes):
                moved = moved_centres(centres, sweep(centres))
                if torch.equal(moved, centres):
                    break
                centres = moved
        return centres, sum(store.frames(name) for name in names)

    return published_once(root_url, unit_inputs(store, names, clusters, seed, iterations, max_frames, passes), fit)


def by_shard(store: FeatureStore, keys: Iterable[str]) -> list[list[str]]:
    """The keys of each shard that has some, in stored order."""
    pieces: dict[str, list[str]] = {}
    for key in store.in_order(keys):
        pieces.setdefault(store.place(key).shard, []).append(key)
    return list(pieces.values())


def shard_sums(store: FeatureStore, centres: Tensor, keys: list[str]) -> Sums:
    """One worker's share of a pass over the clips of a shard; `CHUNK` frames and a clip are in memory at once."""
    sums = torch.zeros(centres.shape, dtype=torch.float64)
    counts = torch.zeros(len(centres), dtype=torch.int64)
    distortion, distance, farthest = 0.0, -1.0, torch.zeros(centres.shape[1])
    origin = centres.mean(0)  # distances by the expanded square lose digits far from it
    for frames in chunks(store.load(key) for key in keys):
        nearest, away = find_nearest(frames - origin, centres - origin)
        found = torch.bincount(nearest, minlength=len(centres))
        ordered = frames[torch.argsort(nearest, stable=True)].double()
        sums += torch.segment_reduce(ordered, "sum", lengths=found, axis=0, initial=0.0)
        counts += found
        distortion += float(away.double().sum())
        if float(away.max()) > distance:
            distance, farthest = float(away.max()), frames[away.argmax()].clone()
    return Sums(sums, counts, distortion, farthest, distance)


def chunks(clips: Iterable[Tensor]) -> Iterator[Tensor]:
    """Clips `(frames, width)` joined to `(CHUNK or more, width)` float32; the last has what is left."""
    waiting: list[Tensor] = []
    for clip in clips:
        waiting.append(clip)
        if sum(map(len, waiting)) >= CHUNK:
            yield torch.cat(waiting).float()
            waiting = []
    if waiting:
        yield torch.cat(waiting).float()


def moved_centres(centres: Tensor, shards: Iterable[Sums]) -> Tensor:
    """The means after one pass, float32; empty clusters move to the shards' farthest frames, the farthest first, and
    those for which none is left stay."""
    total = torch.zeros(centres.shape, dtype=torch.float64)
    counts = torch.zeros(len(centres), dtype=torch.int64)
    far: list[tuple[float, Tensor]] = []
    for shard in shards:
        total += shard.sums
        counts += shard.counts
        far.append((shard.distance, shard.farthest))
    moved = torch.where(counts[:, None] > 0, total / counts.clamp_min(1)[:, None], centres.double()).float()
    far.sort(key=lambda pair: -pair[0])
    for cluster, (_, frame) in zip((counts == 0).nonzero()[:, 0].tolist(), far, strict=False):
        moved[cluster] = frame
    return moved
