"""What a manifest says: from the bytes of a JSONL, JSON, CSV or TSV file to rows of fields."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

# In the order of preference where a folder holds several.
MANIFEST_NAMES = (
    *("manifest.jsonl", "manifest.json", "manifest.csv", "manifest.tsv", "manifest.jsonl.gz"),
    *("metadata.jsonl", "metadata.csv", "metadata.tsv"),
)
MANIFEST_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
AUDIO_FIELDS = ("audio", "audio_filepath", "file_name", "file", "path", "wav")

# What a hostile file may cost: its size in memory, and some 20 times the size of one line or document.
MAX_MANIFEST = 1 << 30  # bytes, after decompression
MAX_LINE = 1 << 20  # bytes
MAX_LINES = 4_000_000  # of a manifest
MAX_DOCUMENT = 64 << 20  # bytes of a JSON list
MAX_OBJECTS = 2_000_000  # brackets of a JSON list
MAX_DEPTH = 32  # brackets within each other

TOO_LARGE = f"the manifest is larger than {MAX_MANIFEST >> 20} MiB; give it in parts, in folders of their own"
TOO_MANY = f"the manifest has more than {MAX_LINES:,} lines; give it in parts, in folders of their own"
TOO_LONG = f"the line is longer than {MAX_LINE >> 20} MiB; shorten its fields, or write one row a line"

LONG_ROW = f"it is longer than {MAX_LINE >> 20} MiB"
REREAD = 8  # times that the lines of a table are read


class Row(NamedTuple):
    """One row of a manifest: its fields by lower-case name, or why it cannot be read."""

    line: int  # from 1, as an editor counts
    fields: dict[str, Any]
    fault: str = ""


def read_rows(data: bytes, name: str) -> Iterator[Row]:
    """All rows of the manifest `name`, in order; a broken line becomes a Row with a fault, and the rest goes on."""
    lower = name.lower()
    if lower.endswith(".gz"):
        return _json_lines(gzip.GzipFile(fileobj=io.BytesIO(data)))
    if len(data) > MAX_MANIFEST:
        return iter([Row(1, {}, TOO_LARGE)])
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    if lower.endswith((".csv", ".tsv")):
        return _table(data, tabs=lower.endswith(".tsv"))
    whole = _whole_json(data) if lower.endswith(".json") else None
    return _json_lines(io.BytesIO(data)) if whole is None else iter(whole)


def _json_lines(file: BinaryIO | gzip.GzipFile) -> Iterator[Row]:
    number = 0
    try:
        for number, line in enumerate(lines_of(file), start=1):
            if number > MAX_LINES:
                yield Row(number, {}, TOO_MANY)
                return
            if len(line) > MAX_LINE:
                yield Row(number, {}, TOO_LONG)
            elif line.strip():
                yield _json_line(number, line)
        if file.tell() > MAX_MANIFEST:
            yield Row(number + 1, {}, TOO_LARGE)
    except (OSError, EOFError, zlib.error) as error:
        yield Row(
            number + 1, {}, f"the compressed data are damaged ({str(error)[:80]}); copy or compress the file again"
        )


def lines_of(file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    """Lines of a file of up to MAX_MANIFEST bytes; of one that is longer than MAX_LINE, little more than that."""
    while file.tell() <= MAX_MANIFEST and (line := file.readline(MAX_LINE + 1)):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n") and file.tell() <= MAX_MANIFEST:
            rest = file.readline(MAX_LINE + 1)
        yield line


def parse_json(text: str) -> Any:
    """The value of a JSON text. ValueError for NaN and for more than MAX_DEPTH brackets within each other."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON; write null")

    value = json.loads(text, parse_constant=refuse)
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"more than {MAX_DEPTH} brackets within each other")
    return value


def _is_deep(value: Any) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            children: Iterable[Any] = item.values() if isinstance(item, dict) else item
            inner += [child for child in children if isinstance(child, dict | list)]
        level = inner
    return bool(level)


def _json_line(number: int, line: bytes) -> Row:
    try:
        value = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return Row(number, {}, "the line is not UTF-8 text; save the manifest as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"the line is not JSON ({str(error)[:80]}); correct it or remove it")
    return _json_row(number, value)


def _json_row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"the row is a JSON {type(value).__name__}, not an object with fields; correct it")
    return Row(number, {key.strip().lower(): item for key, item in value.items()})


def _whole_json(data: bytes) -> list[Row] | None:
    """Rows of a JSON list (or of an object that holds one); None if it is JSON lines under another name."""
    if len(data) > MAX_DOCUMENT or data.count(b"{") + data.count(b"[") > MAX_OBJECTS:
        is_list = data[:64].lstrip()[:1] == b"["
        return [Row(1, {}, "the JSON list is too large; write one object a line")] if is_list else None
    try:
        value = parse_json(data.decode())
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        if "schema_version" in value:
            return []  # an artefact of ours that lies in the folder
        lists = [value[key] for key in ("rows", "data", "samples") if isinstance(value.get(key), list)]
        if not lists:
            return None
        value = lists[0]
    return [_json_row(number, row) for number, row in enumerate(value, start=1)] if isinstance(value, list) else None


def _table(data: bytes, tabs: bool) -> Iterator[Row]:
    if data.count(b"\n") > MAX_LINES or data.count(b"\r") > MAX_LINES:
        yield Row(1, {}, TOO_MANY)
        return
    try:  # only line feeds and carriage returns end a line: a text may hold U+2028 and the like
        lines = list(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline=""))
    except UnicodeDecodeError:
        yield Row(1, {}, "the manifest is not UTF-8 text; save it as UTF-8")
        return
    records = _tab_records(lines) if tabs else _comma_records(lines)
    header: list[str] | None = None
    for line, cells in records:
        if isinstance(cells, str):
            yield Row(line, {}, f"the row is broken ({cells}); close its quotes or remove it")
        elif not any(cell.strip() for cell in cells):
            continue
        elif header is None:
            header = [cell.strip().lower() for cell in cells]
            if not set(header) & set(AUDIO_FIELDS):
                wanted = " or ".join(AUDIO_FIELDS)
                yield Row(line, {}, f"no column is named {wanted}; the first line must name the columns")
                return
        elif any(cells[len(header) :]):
            count = f"{len(cells)} cells under {len(header)} columns"
            yield Row(line, {}, f"{count}; put text that holds a separator in quotes")
        else:
            yield Row(line, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()})


def _tab_records(lines: list[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Tab-separated cells; a quote is a letter like others unless it wraps a cell as spreadsheets do."""
    for number, line in enumerate(lines, start=1):
        cells = [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")] if len(line) <= MAX_LINE else LONG_ROW
        yield number, cells


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    wrapped = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if wrapped else cell


def _comma_records(lines: list[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Cells of each CSV record, or what is wrong with it; an open quote costs its own line, not all that follow.

    Lines that an open quote swallowed are read again, but in all no more than REREAD times: quotes can be set so that
    each of n lines swallows all that follow, which would take the square of n.
    """
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    start = swallowed = 0
    while start < len(lines):
        if swallowed > REREAD * (len(lines) + 1000):
            yield start + 1, "so many quotes are left open that the rest of the file is not read"
            return
        at = start
        rest = map(_bounded, map(lines.__getitem__, range(start, len(lines))))
        reader = csv.reader(rest, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                yield at + 1, cells
                at = start + reader.line_num
            return
        except csv.Error as error:
            yield at + 1, str(error)
            swallowed += start + reader.line_num - at
            start = at + 1


def _bounded(line: str) -> str:
    if len(line) > MAX_LINE:
        raise csv.Error(LONG_ROW)
    return line
