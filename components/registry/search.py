"""What the audio of a lake has of a speaker, a file or a clip: counted in the indexes, with pyarrow.

Only where clips were dropped as duplicates or leaks, so that shards hold more than the index says, and where an ingest
has not finished, are the records of its parts read. No tar is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from components.registry.graph import Audio
from components.registry.records import Gap, Part
from components.schema import AudioManifest, Reject, Strict
from components.seal import read_sealed
from components.shards.index import REJECTS, SCHEMA, read_index
from components.shards.parts import PARTS
from infra.storage import join, list_names, read_text

READ = 4  # records of shards that are read at once
FIRST = 5  # source files that are named unless all are wanted
SEARCHED = {"speaker": ("speaker",), "file": ("original",), "clip": ("id", "key"), "dataset": ()}
COLUMNS = ("shard", "seconds", "split", "original", "audio_digest", "source_digest")


class Subject(NamedTuple):
    """What is looked for."""

    kind: Literal["speaker", "file", "clip", "dataset"]
    name: str


class SourceFile(Strict):
    """A file as ingest found it, by its name below the source: its digest, and those of the clips that came of it."""

    name: str
    digest: str
    digests: tuple[str, ...]


class PartRow(Part):
    """What is needed here of a row in the record of a shard, which has much more."""

    key: str
    id: str
    shard: str
    seconds: float
    split: str | None
    speaker: str | None
    original: str
    audio_digest: str
    source_digest: str


class PartRows(Part):
    """The record of a shard (components/shards/parts.py)."""

    rows: tuple[PartRow, ...]


class AudioPart(Strict):
    """What an audio version has of the subject, or all of it for a data set or a model."""

    dataset: str
    version: str
    digest: str  # empty while ingest has not finished
    url: str
    finished: bool
    clips: int
    seconds: float
    splits: dict[str, int]
    shards: tuple[str, ...]
    dropped: int  # clips that lie in shards, but were taken out of the index as duplicates or leaks
    files: int
    first_files: tuple[SourceFile, ...]
    sources: tuple[str, ...]
    licences: dict[str, int]  # of the whole version


def search(versions: Iterable[Audio], subject: Subject, every: bool) -> tuple[list[AudioPart], list[str], list[Gap]]:
    """What each version has of the subject, notes on what was set aside, and the versions that cannot be read."""
    parts, notes, gaps = [], [], []
    for audio in versions:
        if subject.kind == "dataset" and subject.name not in ("", audio.dataset):
            continue
        try:
            part = _audio_part(audio, subject, every)
            notes += _aside(audio, subject)
        except (ValueError, FileNotFoundError) as error:
            gaps.append(Gap(audio.url, f"cannot be searched: {error}"))
            continue
        if part.clips or part.dropped:
            parts.append(part)
    return parts, notes, gaps


def _audio_part(audio: Audio, subject: Subject, every: bool) -> AudioPart:
    manifest = audio.manifest
    columns = (*COLUMNS, *(name for name in SEARCHED[subject.kind] if name not in COLUMNS))
    source = manifest.sources[0] if manifest and manifest.sources else ""
    find = partial(_matching, subject=subject, source=source)
    rows = in_shards = find(read_index(audio.url, columns)) if manifest else _of_parts(audio.url, columns, find)
    if manifest and sum(shard.samples for shard in manifest.shards) > manifest.samples:
        in_shards = _of_parts(audio.url, columns, find)
    splits = pc.value_counts(pc.fill_null(rows["split"], "undeclared")).to_pylist()
    names = pc.unique(in_shards["original"])
    return AudioPart(
        dataset=audio.dataset,
        version=audio.version,
        digest=audio.digest,
        url=audio.url,
        finished=manifest is not None,
        clips=rows.num_rows,
        seconds=round(pc.sum(rows["seconds"]).as_py() or 0.0, 3),
        splits={pair["values"]: pair["counts"] for pair in sorted(splits, key=lambda pair: pair["values"])},
        shards=tuple(sorted(pc.unique(in_shards["shard"]).to_pylist())),
        dropped=max(0, in_shards.num_rows - rows.num_rows),
        files=len(names),
        first_files=_files(in_shards, names if every else names[:FIRST]),
        sources=manifest.sources if manifest else (),
        licences=manifest.licences if manifest else {},
    )


def _matching(table: pa.Table, subject: Subject, source: str) -> pa.Table:
    """Rows of the subject. A file may be named below its source, from its end, or with the source in front."""
    if subject.kind == "dataset":
        return table
    if subject.kind == "file":
        name = subject.name.removeprefix(source.rstrip("/") + "/") if source else subject.name
        found = pc.or_(pc.equal(table["original"], name), pc.ends_with(table["original"], "/" + name))
    elif subject.kind == "clip":
        found = pc.or_(pc.equal(table["id"], subject.name), pc.equal(table["key"], subject.name))
    else:
        found = pc.equal(table["speaker"], subject.name)
    return table.filter(found)


def _of_parts(url: str, columns: Sequence[str], find: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """What `find` keeps of the clips in the shards, from the records of the parts."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    folder = join(url, PARTS)

    def found(name: str) -> pa.Table:
        rows = read_sealed(join(folder, name), PartRows).rows
        values = {column: [getattr(row, column) for row in rows] for column in columns}
        return find(pa.Table.from_pydict(values, schema))

    with ThreadPoolExecutor(READ) as pool:
        tables = pool.map(found, (name for name in list_names(folder) if name.endswith(".json")))
        return pa.concat_tables([schema.empty_table(), *tables])


def _files(rows: pa.Table, names: pa.Array) -> tuple[SourceFile, ...]:
    some = rows.select(["original", "source_digest", "audio_digest"])
    some = some if len(names) == rows.num_rows else some.filter(pc.is_in(some["original"], names))
    digests: dict[tuple[str, str], list[str]] = {}
    for name, source, digest in zip(*(column.to_pylist() for column in some.columns), strict=True):
        digests.setdefault((name, source), []).append(digest)
    return tuple(SourceFile(name=name, digest=file, digests=tuple(found)) for (name, file), found in digests.items())


def _aside(audio: Audio, subject: Subject) -> list[str]:
    """Inputs of that name that were set aside: nothing of them is in the index."""
    manifest: AudioManifest | None = audio.manifest
    if subject.kind not in ("file", "clip") or manifest is None or not manifest.rejected:
        return []
    field = "original" if subject.kind == "file" else "id"
    notes = []
    for line in read_text(join(audio.url, REJECTS)).split("\n"):
        if not line:
            continue
        reject = Reject.model_validate_json(line)
        name: str = getattr(reject, field)
        if name == subject.name or (field == "original" and name.endswith("/" + subject.name)):
            notes.append(f"{name} was set aside in {audio.dataset}/{audio.version}: {reject.reason}")
    return notes
