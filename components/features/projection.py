"""The artefact of principal components, `<lake>/projections/<digest>/`, and the copy of it in a cache."""

from __future__ import annotations

from typing import Literal

from safetensors.torch import load

from components.digest import digest, digest_bytes
from components.features.compact import Projection
from components.schema import SCHEMA_VERSION, Strict
from components.seal import read_sealed
from infra.storage import exists, join, publish_bytes, read_bytes

TENSORS = "projection.safetensors"
MANIFEST = "projection.json"
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
    for name in (TENSORS, MANIFEST):
        publish_bytes(join(folder, name), read_bytes(join(url, name)))


def load_projection(url: str) -> tuple[Projection, ProjectionManifest]:
    """Components and their manifest; ValueError if they are unfinished or damaged."""
    if not exists(join(url, MANIFEST)):
        raise ValueError(f"no finished principal components at {url}: run the cache stage again")
    try:
        manifest = read_sealed(join(url, MANIFEST), ProjectionManifest)
        data = read_bytes(join(url, TENSORS))
        if digest_bytes(data) != manifest.sha256:
            raise ValueError("its sha256 is not the manifest's")
        projection = Projection(**load(data))
        said = digest(manifest.model_dump(include=set(INPUTS)))[:16]
        if said != manifest.digest or projection.basis.shape != (manifest.dims, manifest.width):
            raise ValueError("its manifest is not the one it was published with")
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise ValueError(
            f"{join(url, TENSORS)} is damaged ({error}): delete {join(url, TENSORS)} and {join(url, MANIFEST)} and run "
            "the cache stage again"
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
