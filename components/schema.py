"""The nouns of the chain: what a clip is, what an artefact's manifest says, what a stage reports.

Everything here is plain pydantic, so that it can be written as JSON, drawn as a form by Prefect and checked
before anything starts. Seconds, hertz and bytes are named in the field; digests are sha256 in hex.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
SAMPLE_RATE = 16_000  # hertz of every clip in the lake

Split = Literal["train", "dev", "test"]


class Strict(BaseModel):
    """A model that refuses unknown fields and cannot be changed after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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


class Recording(Strict):
    """An audio file as it was found, before it is opened."""

    url: str
    digest: str  # sha256 of the bytes (local file) or of ETag and size (remote)
    annotation: Annotation
    start: float = 0.0  # seconds into the file at which the recording begins
    duration: float | None = None  # seconds; None: to the end of the file
    inside: str | None = None  # where in a container it lies: "bytes 1536 8000" of a tar, "row 17 audio" of a table


class Clip(Annotation):
    """The record beside the audio in a shard (`<key>.json`)."""

    key: str  # unique in the data set, safe as a WebDataset key
    seconds: float
    samples: int  # at SAMPLE_RATE, mono
    sample_rate: int = SAMPLE_RATE
    start: float = 0.0  # seconds into the file at which the clip was cut out
    audio_digest: str  # of the decoded 16-bit samples, or as components/shards/digests.py says
    original: str  # name of the file it came from, relative to the source
    marks: tuple[str, ...] = ()  # what was noticed or mended: "clipped", "silent", "downmixed 8 channels", ...
    quality: dict[str, float] = Field(default_factory=dict)  # what components/audio/quality.py measured, if it did


class Reject(Strict):
    """An input that was set aside (one line of rejects.jsonl)."""

    original: str
    id: str
    reason: str
    step: str = "read"  # which step set it aside: read, decode, seconds, snr, bandwidth, clipped, text, duplicate, leak


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
