"""What records say of where something comes from. Fields that are not needed here may be anything.

`lineage.json` of a registered run and `inputs.json`, which a stage and a run have from the moment they begin, have the
same three lists: `data`, `features` and `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.schema import AudioManifest, FeatureManifest
from components.seal import read_sealed
from infra.storage import read_json

INPUTS = "inputs.json"  # of a stage or run: what it is made from
LINEAGE = "model/lineage.json"  # of a run that was registered
REGISTERED = "registered.json"

Said = TypeVar("Said", bound=BaseModel)


class Part(BaseModel):
    """What is needed of a record; the rest of it is of no interest here."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Link(Part):
    """An audio version, as a record names it."""

    dataset: str
    version: str
    digest: str


class FeatureLink(Link):
    """A feature cache, as its manifest or a record names it."""

    fingerprint: str
    audio_digest: str
    kind: str = "features"
    key: dict[str, Any] = Field(default_factory=dict)
    samples: int = 0
    frames: int = 0
    width: int = 0

    @property
    def place(self) -> str:
        """`<fingerprint>/<dataset>/<version>`, below `features`."""
        return f"{self.fingerprint}/{self.dataset}/{self.version}"

    @property
    def codebook(self) -> str | None:
        """Digest of the codebook, if it is a cache of units."""
        named = self.key.get("codebook")
        return str(named) if named else None

    @property
    def projection(self) -> str | None:
        """Digest of the principal components, if the form of the cache has some; the cache holds a copy of them."""
        form = self.key.get("form")
        named = form.get("projection") if isinstance(form, dict) else None
        return str(named) if named else None

    @property
    def encoder(self) -> str:
        """Name of the encoder, with the pooling and the form that it is cached with."""
        spec, form = self.key.get("encoder"), self.key.get("form")
        spec = spec if isinstance(spec, dict) else {"kind": spec or "unknown"}
        pooled = f", pooled by {spec['pool']}" if spec.get("pool") not in (None, 1) else ""
        return f"{spec.get('kind')}{pooled}" + (f", {form.get('name')}" if isinstance(form, dict) else "")


class Record(Part):
    """What a stage or a run was made from; `stages` are the names of their folders, those before it for a stage."""

    data: tuple[Link, ...]
    features: tuple[FeatureLink, ...] = ()
    stages: tuple[str, ...] = ()
    weights: dict[str, str] = Field(default_factory=dict)  # reference of pretrained weights -> digest

    @field_validator("stages")
    @classmethod
    def _names(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(url.rstrip("/").rpartition("/")[2] for url in urls)  # a lake may have been moved


class Registration(Part):
    """registered.json of a run: the version that was made of it last."""

    name: str
    version: str
    alias: str
    tracking_uri: str


class Codebook(Part):
    """manifest.json of `<lake>/units/<digest>/`."""

    digest: str
    features: str  # digest of the cache that it was fitted on


class Projection(Part):
    """projection.json of `<lake>/projections/<digest>/`: principal components."""

    digest: str
    audio: str  # digest of the audio whose features it was fitted on


class Gap(NamedTuple):
    """Something whose origin is not known, or cannot be read."""

    url: str
    lacks: str


def inputs(
    audio: Sequence[AudioManifest], features: Sequence[FeatureManifest], stages: Sequence[str]
) -> dict[str, Any]:
    """What `inputs.json` of a stage or run holds: its audio, its caches and the stages before it (URLs or names)."""
    record = Record(
        data=tuple(Link.model_validate(manifest.model_dump()) for manifest in audio),
        features=tuple(FeatureLink.model_validate(manifest.model_dump()) for manifest in features),
        stages=tuple(stages),
    )
    return {"schema_version": 1} | record.model_dump(mode="json", exclude={"weights"})


def read_part(url: str, kind: type[Said], has_seal: bool = False) -> Said | Gap | None:
    """The record at a URL; None if there is none, a gap if it cannot be read, or lacks the seal that it should have."""
    try:
        return read_sealed(url, kind) if has_seal else kind.model_validate(read_json(url))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        return Gap(url, f"cannot be read: {' '.join(str(error).split())[:200]}")
