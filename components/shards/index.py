"""The sidecar index of an audio data set, `samples.parquet`: one row a clip, so that no plan has to open a tar."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet as pq

from components.digest import digest_bytes
from components.schema import AudioManifest, Clip, Strict
from components.seal import read_sealed
from components.shards.arrays import read_parquet, rows_at
from infra.storage import exists, join, read_bytes

MANIFEST = "manifest.json"
INDEX = "samples.parquet"
REJECTS = "rejects.jsonl"

JSON_COLUMNS = ("labels", "translation", "marks", "conversations")
TEXT = (
    "key",
    "id",
    "shard",
    "text",
    "language",
    "speaker",
    "gender",
    "split",
    "labels",
    "translation",
    "caption",
    "audio_digest",
    "original",
    "marks",
    "conversations",
)
MEASURES = ("loudness", "peak", "clipped", "snr", "bandwidth", "silence")  # null where nothing was measured
BESIDE = pa.struct([("suffix", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("digest", pa.string())])
COLUMNS: list[tuple[str, pa.DataType]] = [
    *((name, pa.string()) for name in ("key", "id", "shard")),
    *((name, pa.int64()) for name in ("audio_offset", "audio_size", "json_offset", "json_size")),
    ("seconds", pa.float64()),
    ("samples", pa.int64()),
    ("text", pa.string()),
    ("text_length", pa.int64()),
    *((name, pa.string()) for name in TEXT[4:]),
    ("source_digest", pa.string()),
    ("start", pa.float64()),
    *((name, pa.float64()) for name in MEASURES),
    ("fingerprint", pa.list_(pa.uint32())),
    *((name, BESIDE) for name in ("image", "video")),  # null where a clip has none
]
SCHEMA = pa.schema(COLUMNS)


class Beside(Strict):
    """A picture or a video in a shard, the member `<key>.<suffix>`."""

    suffix: str
    offset: int  # bytes in the tar
    size: int  # bytes
    digest: str  # sha256


class SampleRow(Strict):
    """A row of the index; offsets and sizes are bytes in the tar, `labels`, `translation`, `marks` and
    `conversations` JSON, the measures those of components/audio/quality.py."""

    key: str
    id: str
    shard: str
    audio_offset: int
    audio_size: int
    json_offset: int
    json_size: int
    seconds: float
    samples: int
    text: str | None
    text_length: int  # letters; 0 without a text
    language: str | None
    speaker: str | None
    gender: str | None
    split: str | None
    labels: str
    translation: str
    caption: str | None
    audio_digest: str
    original: str
    marks: str
    conversations: str
    source_digest: str  # of the file, as Recording.digest
    start: float  # seconds into the file at which the clip was cut out
    loudness: float | None = None
    peak: float | None = None
    clipped: float | None = None
    snr: float | None = None
    bandwidth: float | None = None
    silence: float | None = None
    fingerprint: tuple[int, ...] | None = None
    image: Beside | None = None
    video: Beside | None = None


def sample_row(
    clip: Clip,
    shard: str,
    audio: tuple[int, int],
    record: tuple[int, int],
    source_digest: str,
    fingerprint: tuple[int, ...] | None = None,
    media: Mapping[str, Beside] | None = None,
) -> SampleRow:
    """The row of a clip whose audio and record lie at `(offset, size)` in a shard.

    `source_digest` is that of the file it came from (Recording.digest), `media` what lies beside it in the shard.
    """
    return SampleRow(
        key=clip.key,
        id=clip.id,
        shard=shard,
        audio_offset=audio[0],
        audio_size=audio[1],
        json_offset=record[0],
        json_size=record[1],
        seconds=clip.seconds,
        samples=clip.samples,
        text=clip.text,
        text_length=len(clip.text or ""),
        language=clip.language,
        speaker=clip.speaker,
        gender=clip.gender,
        split=clip.split,
        labels=_json(clip.labels),
        translation=_json(clip.translation),
        caption=clip.caption,
        audio_digest=clip.audio_digest,
        original=clip.original,
        marks=_json(clip.marks),
        conversations=_json(clip.conversations),
        source_digest=source_digest,
        start=clip.start,
        **{name: clip.quality.get(name) for name in MEASURES},
        fingerprint=fingerprint,
        image=media.get("image") if media else None,
        video=media.get("video") if media else None,
    )


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # once: `json.dumps` makes one each time


def _json(value: object) -> str:
    return _COMPACT.encode(value)


def to_table(rows: Sequence[SampleRow | Mapping[str, Any]]) -> pa.Table:
    """Rows, or what `SampleRow.model_dump` gives of them, as the table that `read_index` gives back.

    By way of JSON, which Arrow reads by itself: to take over Python's values it imports pandas, for a second.
    """
    if not rows:
        return pa.Table.from_batches([], SCHEMA)
    lines = "".join(f"{_line(row)}\n" for row in rows).encode()
    reading = pa.json.ReadOptions(use_threads=False, block_size=len(lines) + 1)  # a row has to lie in one block
    parsing = pa.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    return pa.json.read_json(io.BytesIO(lines), reading, parsing).combine_chunks()


def _line(row: SampleRow | Mapping[str, Any]) -> str:
    return row.model_dump_json() if isinstance(row, SampleRow) else json.dumps(row, ensure_ascii=False, allow_nan=False)


def table_bytes(table: pa.Table) -> bytes:
    """`samples.parquet`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=16_384)
    return buffer.getvalue()


def find_manifest(root_url: str) -> AudioManifest | None:
    """The manifest of a finished audio data set, or None. ValueError if it cannot be read."""
    url = join(root_url, MANIFEST)
    if not exists(url):
        return None
    try:
        return read_sealed(url, AudioManifest)
    except ValueError as error:
        raise ValueError(f"{error}: remove that file and ingest again") from error


def read_manifest(root_url: str) -> AudioManifest:
    """The manifest of a finished audio data set. FileNotFoundError if it is not finished."""
    manifest = find_manifest(root_url)
    if manifest is None:
        raise FileNotFoundError(f"no finished audio at {root_url}: run the ingest stage, it resumes")
    return manifest


def read_index(root_url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a finished data set, in the order of its shards; `columns` chooses some.

    FileNotFoundError if the data set is not finished, ValueError if the index is damaged.
    """
    manifest = read_manifest(root_url)
    url = join(root_url, INDEX)
    data = read_bytes(url)
    if digest_bytes(data) != manifest.index_sha256:
        raise ValueError(
            f"{url} is damaged (its sha256 is not the manifest's): ingest again, it is rebuilt from the parts"
        )
    try:
        table = read_parquet(data, columns or SCHEMA.names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url} cannot be read ({error}): ingest again, it is rebuilt from the parts") from error
    lacking = [name for name in columns or SCHEMA.names if name not in table.column_names]
    if lacking or table.num_rows != manifest.samples:
        raise ValueError(
            f"{url} has {table.num_rows} rows for {manifest.samples} samples, columns missing: {lacking}; "
            "ingest again, it is rebuilt from the parts"
        )
    return table


class Rows(Sequence[dict[str, Any]]):
    """Rows of an index as dictionaries whose JSON columns are read, made when they are asked for: a table of ten
    million rows stays a table."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | Rows:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return Rows(self.table.take(rows_at(np.arange(start, stop, step))))
        if not -len(self) <= at < len(self):
            raise IndexError(f"row {at} of {len(self)}")
        return _read(self.table.slice(at % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=4096):
            yield from map(_read, batch.to_pylist())

    def where(self, column: str, value: Any) -> Rows:
        """The rows whose `column` has this value, in their order."""
        return Rows(self.table.filter(pa.compute.field(column) == value))


def _read(row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: json.loads(row[name]) for name in JSON_COLUMNS}


def read_rows(root_url: str) -> Rows:
    """The index without fingerprints as dictionaries: what planning and tasks work on. Raises as read_index."""
    return Rows(read_index(root_url, [name for name in SCHEMA.names if name != "fingerprint"]))
