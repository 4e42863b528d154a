"""Tables of audio as Hugging Face `datasets` keeps them: `*.parquet` of the hub, `*.arrow` of `save_to_disk`.

https://huggingface.co/docs/datasets/about_dataset_features: audio is a cell `{bytes, path}` or a path, and an integer
label has its name in the features, which stand in the table itself or in `dataset_info.json` beside it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

from components.audio.columns import Columns, audio_columns, json_file, named_fields
from components.audio.identity import digest_of
from components.audio.inside import BUFFER, Container, check_group
from components.audio.rows import (
    BadRow,
    Found,
    annotation,
    gather,
    part_of_file,
    rejected,
    split_in_name,
    stem,
    within,
)
from components.schema import Reject
from infra import storage

STATE = "state.json"
MAX_ROWS = 4_000_000  # of one file
ROWS = 64  # that are in memory at once, besides the row group


class Cell(NamedTuple):
    """A row of a table."""

    row: int
    fields: dict[str, Any]
    path: str | None  # as it is written
    inside: str | None = None
    digest: str = ""


def tables_in(root: str, names: list[str]) -> tuple[list[str], list[Reject]]:
    """Tables among `names`, without what `datasets` has cached beside them, and those that a `state.json` misses."""
    chosen = [name for name in names if name.lower().endswith(".parquet")]
    rejects: list[Reject] = []
    arrows = [name for name in names if name.lower().endswith(".arrow")]
    for folder in dict.fromkeys(posixpath.dirname(name) for name in arrows):
        here = {name for name in arrows if posixpath.dirname(name) == folder}
        listed = _listed(root, posixpath.join(folder, STATE)) if posixpath.join(folder, STATE) in names else None
        for name in sorted(listed - here) if listed else ():
            rejects.append(rejected(name, f"the file is missing, although {STATE} names it; copy it there"))
        kept = here & listed if listed else {name for name in here if not _is_cache(name)}
        chosen += sorted(kept)
    return sorted(chosen), rejects


def _is_cache(name: str) -> bool:
    return posixpath.basename(name).startswith(("cache-", "indices-"))


def _listed(root: str, name: str) -> set[str] | None:
    """The files that a `state.json` names, if it is one of `datasets`."""
    try:
        files = json_file(root, name).get("_data_files")
    except BadRow:
        return None
    if not isinstance(files, list) or not all(isinstance(item, dict) for item in files):
        return None
    plain = {item.get("filename") for item in files}
    return {posixpath.join(posixpath.dirname(name), str(file)) for file in plain if file and "/" not in str(file)}


def table_rows(root: str, name: str, names: frozenset[str]) -> tuple[list[Found], list[Reject]]:
    """A recording for each row of the Parquet or Arrow file `name`, and what was set aside."""
    return gather(_recordings(root, name, names), name)


def _recordings(root: str, name: str, names: frozenset[str]) -> Iterator[Found | Reject]:
    import pyarrow as pa

    with Container(storage.join(root, name)) as container:
        cells = _arrow_cells if name.lower().endswith(".arrow") else _parquet_cells
        split = split_in_name(name)
        try:
            for cell in cells(root, name, container):
                place = f"{name}: row {cell.row}"
                try:
                    yield _recording(root, name, cell, place, split, names)
                except BadRow as error:
                    yield rejected(place, str(error))
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
            if container.error:
                raise container.error from None
            again = "" if ";" in str(error) else "; copy or write it again"
            yield rejected(name, f"the table cannot be read: {str(error)[:300]}{again}")


def _recording(root: str, name: str, cell: Cell, place: str, split: Any, names: frozenset[str]) -> Found:
    if cell.inside is None and not cell.path:
        raise BadRow("the row has no audio; remove it or add its file")
    path = name if cell.inside else within(root, posixpath.dirname(name), str(cell.path), names)
    file = stem(posixpath.basename((cell.path or "").replace("\\", "/"))) if cell.inside else stem(path)
    start, duration = part_of_file(cell.fields) or (0.0, None)
    noted = annotation({"split": split, **cell.fields}, file or f"{stem(name)}-{cell.row:06d}")
    return Found(path, noted, place, "", start, duration, cell.inside, cell.digest)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _parquet_cells(root: str, name: str, container: Container) -> Iterator[Cell]:
    """Rows of a Parquet file. The audio itself is read only if it is local, where its digest costs no download."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(container.file, buffer_size=BUFFER)  # page by page, not a column at once
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    _refuse_rows(sum(group.num_rows for group in groups), container.size)
    columns = audio_columns(root, name, file.schema_arrow)
    binary = columns.nested or "binary" in str(file.schema_arrow.field(columns.audio).type)
    audio = f"{columns.audio}.bytes" if columns.nested else columns.audio
    parts = {field.name for field in file.schema_arrow.field(columns.audio).type.fields} if columns.nested else set()
    path = [f"{columns.audio}.path"] if "path" in parts else []
    row = 0
    for number, group in enumerate(groups):
        check_group(group)
        there = binary and not storage.is_local(root) and _first(file, number, audio) is not None
        wanted = [*columns.fields, *path, *([] if there else [audio])]
        # without a column to read there would be no batches at all
        for batch in file.iter_batches(ROWS, row_groups=[number], columns=wanted or [audio]):
            for values in batch.to_pylist():
                given = values.get(columns.audio)
                data, source = (given.get("bytes"), given.get("path")) if isinstance(given, dict) else (given, given)
                inside = f"row {row} {columns.audio}"
                fields = named_fields(values, columns)
                if there:
                    yield Cell(row, fields, _text(source), inside)
                elif isinstance(data, bytes):
                    yield Cell(row, fields, _text(source), inside, digest_of(data))
                else:
                    yield Cell(row, fields, _text(source))
                row += 1
        if row != sum(one.num_rows for one in groups[: number + 1]):
            raise BadRow(f"it has {row:,} rows where it declares more; copy or write it again")


def _first(file: Any, number: int, column: str) -> Any:
    """The first value of a column in a row group: if it is null, the table may be one of paths."""
    batch = next(file.iter_batches(1, row_groups=[number], columns=[column]), None)
    value = batch.column(0)[0].as_py() if batch is not None and batch.num_rows else None
    return value.get("bytes") if isinstance(value, dict) else value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _refuse_rows(rows: int, size: int) -> None:
    if not 0 <= rows <= min(MAX_ROWS, size):
        raise BadRow(f"it declares {rows:,} rows in {size:,} bytes; write it in smaller files")


def _arrow_cells(root: str, name: str, container: Container) -> Iterator[Cell]:
    """Rows of an Arrow file, with the place in the file of each audio that it holds."""
    from components.audio.arrow import Batch, batches, places

    columns: Columns | None = None
    row = 0
    for item in batches(container.file, container.size):
        if not isinstance(item, Batch):
            columns = audio_columns(root, name, item)
            continue
        assert columns is not None  # the schema is the first message
        _refuse_rows(row + item.values.num_rows, container.size)
        cells: Any = item.values.column(columns.audio)
        parts = {field.name: cells.field(field.name) for field in cells.type.fields} if columns.nested else {}
        data: Any = parts.get("bytes") if columns.nested else cells if "binary" in str(cells.type) else None
        sources: Any = parts.get("path") if columns.nested else cells if data is None else None
        spots = places(item, data) if data is not None else [None] * len(cells)
        for index, spot in enumerate(spots):
            fields = named_fields({name: item.values.column(name)[index].as_py() for name in columns.fields}, columns)
            source = _text(sources[index].as_py()) if sources is not None else None
            if spot is None:
                yield Cell(row, fields, source)
            else:
                digest = digest_of(memoryview(data[index].as_buffer())) if storage.is_local(root) else ""
                yield Cell(row, fields, source, f"bytes {spot[0]} {spot[1]}", digest)
            row += 1
