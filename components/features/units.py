"""Discrete units: k-means over encoder frames, as in TWIST, SpiritLM and SpeechGPT, and their codebook artefact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from components.digest import digest
from components.features.fitted import NOT_ITS_OWN, Files, load_fitted, publish_fitted
from components.features.store import FeatureStore
from components.schema import SCHEMA_VERSION, Strict
from infra.storage import exists, join

UNITS_VERSION = 2  # raise it when fit_codebook or lloyd.py may give another codebook for the same input
FILES = Files("codebook.safetensors", "manifest.json")
INPUTS = (
    "features",
    "keys",
    "clusters",
    "seed",
    "iterations",
    "max_frames",
    "passes",
    "units_version",
)  # of the digest
CHUNK = 16_384  # frames whose distances are held at once
START_FRAMES_PER_CLUSTER = 16  # the k-means++ start looks at a sample of this size, Lloyd's steps at all frames


class CodebookManifest(Strict):
    """manifest.json of `<lake>/units/<digest>/`; written last."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["codebook"] = "codebook"
    digest: str
    sha256: str  # of codebook.safetensors
    clusters: int
    width: int
    seed: int
    iterations: int
    frames: int  # that it was fitted on
    max_frames: int
    features: str  # digest of the FeatureManifest
    keys: str  # digest of the keys
    passes: int  # over all frames, by components/features/lloyd.py
    units_version: int
    seal: str = ""  # see components/seal.py


def fit_codebook(frames: Tensor, clusters: int, seed: int = 0, iterations: int = 25) -> Tensor:
    """Centres of `frames` `(n, width)` by Lloyd's k-means → `(clusters, width)` float32, same input, same result.

    Starts with greedy k-means++ (Arthur and Vassilvitskii, 2007); a cluster that loses all of its frames moves to the
    frame that lies farthest from its centre. Stops early when no frame changes its cluster.
    ValueError if there are fewer frames than clusters.
    """
    if not 0 < clusters <= len(frames):
        raise ValueError(
            f"{clusters} clusters cannot be fitted to {len(frames)} frames: ask for fewer clusters or give more audio"
        )
    points = frames.to(torch.float32, copy=True)
    mean = points.mean(0)
    points -= mean  # distances by the expanded square lose digits far from the origin
    centres = _start(points, clusters, torch.Generator().manual_seed(seed))
    previous = None
    for _ in range(iterations):
        nearest, distance = find_nearest(points, centres)
        if previous is not None and torch.equal(nearest, previous):
            break
        centres = _means(points, nearest, distance, centres)
        previous = nearest
    return centres + mean


def assign(features: Tensor, codebook: Tensor) -> Tensor:
    """Unit of each frame, `(frames, width)` and `(clusters, width)` → `(frames,)` int32; ties go to the lower unit."""
    return find_nearest(features.float(), codebook.float())[0].to(torch.int32)


def deduplicate(units: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of equal units as one: `(frames,)` → units `(runs,)` and their lengths `(runs,)` int64."""
    values, lengths = torch.unique_consecutive(units, return_counts=True)
    return values, lengths


def unit_inputs(
    store: FeatureStore, names: list[str], clusters: int, seed: int, iterations: int, max_frames: int, passes: int
) -> dict[str, Any]:
    """All that decides a codebook, of which its digest is made; `names` are sorted. ValueError if there are none."""
    if not names:
        raise ValueError(f"no clips to fit a codebook on: is there a train split in {store.root}?")
    named = (store.manifest.digest, digest(names), clusters, seed, iterations, max_frames, passes, UNITS_VERSION)
    return dict(zip(INPUTS, named, strict=True))


def published_once(root_url: str, inputs: dict[str, Any], fit: Callable[[], tuple[Tensor, int]]) -> tuple[str, str]:
    """URL and digest of the codebook with these inputs; if it is not there, `fit` gives it and its number of frames."""

    def fitted() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made, frames = fit()
        return {"codebook": made}, {"width": made.shape[1], "frames": frames}

    return publish_fitted(join(root_url, "units"), FILES, CodebookManifest, inputs, fitted)


def gather_frames(store: FeatureStore, keys: list[str], max_frames: int, seed: int) -> Tensor:
    """Frames of whole clips drawn by `seed` until `max_frames` are there → `(n, width)` bfloat16, in store order."""
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[str] = []
    total = 0
    for i in order:
        if total >= max_frames:
            break
        chosen.append(keys[i])
        total += store.frames(keys[i])
    return torch.cat([store.load(key) for key in store.in_order(chosen)])[:max_frames]


def load_codebook(url: str) -> tuple[Tensor, CodebookManifest]:
    """Codebook `(clusters, width)` float32 and its manifest; ValueError if it is unfinished or damaged."""
    if not exists(join(url, FILES.manifest)):
        raise ValueError(f"no finished codebook at {url}: fit it again")
    try:
        tensors, manifest = load_fitted(url, FILES, CodebookManifest, INPUTS)
        codebook = tensors["codebook"]
        if codebook.shape != (manifest.clusters, manifest.width):
            raise ValueError(NOT_ITS_OWN)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"{join(url, FILES.tensors)} is damaged ({error}): delete the folder {url} and fit it again"
        ) from error
    return codebook, manifest


def find_nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centre and the squared distance to it, both `(n,)`, by |x|² - 2xC + |C|²."""
    square = centres.square().sum(1)
    found = [torch.addmm(square, chunk, centres.T, alpha=-2).min(1) for chunk in torch.split(points, CHUNK)]
    if not found:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0)
    distance = torch.cat([result.values for result in found]) + points.square().sum(1)
    return torch.cat([result.indices for result in found]), distance.clamp_min_(0)


def _start(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few frames drawn with probability by squared distance, the one that helps most."""
    sample = torch.randperm(len(points), generator=generator)[: max(clusters * START_FRAMES_PER_CLUSTER, 4096)]
    points = points[sample]
    centres = points[:1].clone()
    distance = (points - centres[0]).square().sum(1)
    square = points.square().sum(1)
    draws = 2 + int(math.log(clusters))
    for _ in range(clusters - 1):
        reach = distance.double().cumsum(0)
        drawn = torch.rand(draws, generator=generator, dtype=torch.float64).to(reach.device) * reach[-1]
        candidates = torch.searchsorted(reach, drawn, right=True).clamp_max(len(points) - 1)
        away = square + square[candidates, None] - 2 * points[candidates] @ points.T
        nearer = torch.minimum(distance, away.clamp_min_(0))
        best = int(nearer.sum(1).argmin())
        centres = torch.cat([centres, points[candidates[best]][None]])
        distance = nearer[best]
    return centres


def _means(points: Tensor, nearest: Tensor, distance: Tensor, centres: Tensor) -> Tensor:
    """Mean of each cluster's points; an empty cluster takes the farthest point that no other has taken."""
    counts = torch.bincount(nearest, minlength=len(centres))
    order = torch.argsort(nearest, stable=True)  # index_add_ would be slow here and without a fixed order on a GPU
    sums = torch.segment_reduce(points[order], "sum", lengths=counts, axis=0, initial=0.0)
    means = sums / counts.clamp_min(1)[:, None]
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = points[torch.argsort(distance, descending=True, stable=True)[: len(empty)]]
    return means
