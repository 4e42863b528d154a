"""The artefact of principal components, `<lake>/projections/<digest>/`, and the copy of it in a cache."""

from __future__ import annotations

from typing import Literal

from components.features.compact import Projection
from components.features.fitted import NOT_ITS_OWN, Files, load_fitted
from components.schema import SCHEMA_VERSION, Strict
from infra.storage import exists, join, publish_bytes, read_bytes

FILES = Files("projection.safetensors", "projection.json")
INPUTS = ("features", "audio", "keys", "dims", "seed", "max_frames", "projection_version")  # make the digest


class ProjectionManifest(Strict):
    """projection.json of `<lake>/projections/<digest>/`; written last."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["projection"] = "projection"
    digest: str
    sha256: str  # of projection.safetensors
    dims: int
    width: int
    frames: int  # that it was fitted on
    explained: float  # share of the frames' variance that the components hold
    seed: int
    max_frames: int
    features: str  # fingerprint of the bfloat16 features
    audio: str  # digest of the AudioManifest
    keys: str  # digest of the keys
    projection_version: int
    seal: str = ""  # see components/seal.py


def copy_projection(url: str, folder: str) -> None:
    """Into a cache, so that it can be read by itself; the record comes last, as at its own place."""
    load_projection(url)
    for name in FILES:
        publish_bytes(join(folder, name), read_bytes(join(url, name)))


def load_projection(url: str) -> tuple[Projection, ProjectionManifest]:
    """Components and their manifest; ValueError if they are unfinished or damaged."""
    if not exists(join(url, FILES.manifest)):
        raise ValueError(f"no finished principal components at {url}: run the cache stage again")
    try:
        tensors, manifest = load_fitted(url, FILES, ProjectionManifest, INPUTS)
        projection = Projection(**tensors)
        if projection.basis.shape != (manifest.dims, manifest.width):
            raise ValueError(NOT_ITS_OWN)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(
            f"{join(url, FILES.tensors)} is damaged ({error}): delete {join(url, FILES.tensors)} and "
            f"{join(url, FILES.manifest)} and run the cache stage again"
        ) from error
    return projection, manifest


def copied_projection(folder: str, name: str, width: int) -> Projection:
    """The components in a cache; ValueError if they are damaged, or not those with digest `name` of `width` numbers."""
    projection, manifest = load_projection(folder)
    if (manifest.digest, manifest.width) != (name, width):
        raise ValueError(
            f"{folder} holds other principal components than the cache was made with: delete that folder and run the "
            "cache stage again"
        )
    return projection
