"""The nouns of the chain: what a clip is, what an artefact's manifest says, what a stage reports.

Everything here is plain pydantic, so that it can be written as JSON, drawn as a form by Prefect and checked
before anything starts. Seconds, hertz and bytes are named in the field; digests are sha256 in hex.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
SAMPLE_RATE = 16_000  # hertz of every clip in the lake

Split = Literal["train", "dev", "test"]
MediaKind = Literal["image", "video"]


class Strict(BaseModel):
    """A model that refuses unknown fields and cannot be changed after it was made."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True)


Made = TypeVar("Made", bound=Strict)
_NO_FIELDS: set[str] = set()  # shared, and never added to: Strict is frozen, and a copy has its own


def slim(model: Made) -> Made:
    """The model itself, without its note of which fields were given: 0.7 kB each, and there may be a million."""
    object.__setattr__(model, "__pydantic_fields_set__", _NO_FIELDS)
    return model


class Annotation(Strict):
    """What people said about a recording; everything is optional but the id."""

    id: str
    text: str | None = None
    language: str | None = None
    speaker: str | None = None
    gender: str | None = None
    split: Split | None = None
    labels: dict[str, Any] = Field(default_factory=dict)
    translation: dict[str, str] = Field(default_factory=dict)
    caption: str | None = None
    source: str | None = None
    licence: str | None = None
    conversations: list[dict[str, Any]] | None = None


class Media(Strict):
    """A picture or a video beside the audio of a recording, as it was found."""

    kind: MediaKind
    url: str
    digest: str  # as Recording.digest
    inside: str | None = None  # as Recording.inside


class Recording(Strict):
    """An audio file as it was found, before it is opened."""

    url: str
    digest: str  # BLAKE3 of the bytes (local file), sha256 of ETag and size (remote), or as audio/identity.py says
    annotation: Annotation
    start: float = 0.0  # seconds into the file at which the recording begins
    duration: float | None = None  # seconds; None: to the end of the file
    inside: str | None = None  # where in a container it lies: "bytes 1536 8000" of a tar, "row 17 audio" of a table
    media: tuple[Media, ...] = ()  # at most one of each kind


class Clip(Annotation):
    """The record beside the audio in a shard (`<key>.json`)."""

    key: str  # unique in the data set, safe as a WebDataset key
    seconds: float
    samples: int  # at SAMPLE_RATE, mono
    sample_rate: int = SAMPLE_RATE
    start: float = 0.0  # seconds into the file at which the clip was cut out
    audio_digest: str  # of the decoded 16-bit samples: BLAKE3, or as components/shards/digests.py says
    original: str  # name of the file it came from, relative to the source
    marks: tuple[str, ...] = ()  # what was noticed or mended: "clipped", "silent", "downmixed 8 channels", ...
    quality: dict[str, float] = Field(default_factory=dict)  # what components/audio/quality.py measured, if it did


class Reject(Strict):
    """An input that was set aside (one line of rejects.jsonl)."""

    original: str
    id: str
    reason: str
    step: str = (
        "read"  # what set it aside: read, media, decode, seconds, snr, bandwidth, clipped, text, duplicate, leak
    )


class ShardInfo(Strict):
    """One tar of an audio or feature artefact."""

    name: str  # shard-000000.tar
    sha256: str
    bytes: int
    samples: int
    seconds: float


class AudioManifest(Strict):
    """manifest.json of `<lake>/audio/<dataset>/<version>/`; written last."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["audio"] = "audio"
    dataset: str
    version: str
    digest: str  # of shards and index: what later stages depend on
    shards: tuple[ShardInfo, ...]
    samples: int
    seconds: float
    rejected: int
    splits: dict[str, int]
    asides: dict[str, int] = Field(default_factory=dict)  # rejected inputs by the step that set them aside
    config: dict[str, Any]
    sources: tuple[str, ...]
    licences: dict[str, int]
    index_sha256: str = ""  # of samples.parquet
    seal: str = ""  # see components/seal.py


class FeatureManifest(Strict):
    """manifest.json of `<lake>/features/<fingerprint>/<dataset>/<version>/`; written last."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["features", "units"] = "features"
    fingerprint: str
    key: dict[str, Any]
    dataset: str
    version: str
    audio_digest: str  # digest of the AudioManifest it was made from
    digest: str
    shards: tuple[ShardInfo, ...]
    samples: int
    frames: int
    width: int
    index_sha256: str = ""  # of features.parquet
    seal: str = ""  # see components/seal.py


class StageReport(Strict):
    """One line of the table that a run ends with."""

    stage: str
    state: Literal["done", "up to date", "resumed"]
    done: int = 0
    reused: int = 0
    unit: str = "shards"
    seconds: float = 0.0
    note: str = ""
    url: str = ""
