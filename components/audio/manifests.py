"""What a manifest says: from the bytes of a JSONL, JSON, CSV or TSV file to annotated rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from components.schema import Annotation, Split

# In the order of preference where a folder holds several.
MANIFEST_NAMES = (
    *("manifest.jsonl", "manifest.json", "manifest.csv", "manifest.tsv"),
    *("metadata.jsonl", "metadata.csv", "metadata.tsv"),
)
MANIFEST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")

AUDIO_FIELDS = ("audio", "audio_filepath", "file_name", "file", "path", "wav")
TEXT_FIELDS = ("text", "sentence", "transcript", "transcription")
ALIASES = {
    "language": ("language", "lang", "locale"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "gender": ("gender", "sex"),
    "caption": ("caption",),
    "source": ("source",),
    "licence": ("licence", "license"),
}
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation", "development"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
GENDERS = {"m": "male", "man": "male", "f": "female", "w": "female", "woman": "female"}


class Row(NamedTuple):
    """One row of a manifest: its fields by lower-case name, or why it cannot be read."""

    line: int  # from 1, as an editor counts
    fields: dict[str, Any]
    fault: str = ""


class BadRow(ValueError):
    """A row that is set aside; its text is the reason."""


def read_rows(data: bytes, name: str) -> list[Row]:
    """All rows of the manifest `name`, in order; a broken line becomes a Row with a fault, and the rest goes on."""
    suffix = name[name.rfind(".") :].lower()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    if suffix in (".csv", ".tsv"):
        return list(_table(data, tabs=suffix == ".tsv"))
    if suffix == ".json":
        whole = _whole_json(data)
        if whole is not None:
            return whole
    lines = enumerate(data.split(b"\n"), start=1)
    return [_json_line(number, line) for number, line in lines if line.strip()]


def _json(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON; write null")

    return json.loads(text, parse_constant=refuse)


def _json_line(number: int, line: bytes) -> Row:
    try:
        value = _json(line.decode())
    except UnicodeDecodeError:
        return Row(number, {}, "the line is not UTF-8 text; save the manifest as UTF-8")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"the line is not JSON ({str(error)[:80]}); correct it or remove it")
    return _json_row(number, value)


def _json_row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"the row is a JSON {type(value).__name__}, not an object with fields; correct it")
    return Row(number, {str(key).strip().lower(): item for key, item in value.items()})


def _whole_json(data: bytes) -> list[Row] | None:
    """Rows of a JSON list (or of an object that holds one); None if it is JSON lines under another name."""
    try:
        value = _json(data.decode())
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
    try:
        lines = data.decode().splitlines(keepends=True)
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
        yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    wrapped = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if wrapped else cell


def _comma_records(lines: list[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Cells of each CSV record, or what is wrong with it; an open quote costs its own line, not all that follow."""
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    start = 0
    while start < len(lines):
        at = start
        rest = map(lines.__getitem__, range(start, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for cells in reader:
                yield at + 1, cells
                at = start + reader.line_num
            return
        except csv.Error as error:
            yield at + 1, str(error)
            start = at + 1


def audio_path(fields: dict[str, Any]) -> str:
    """The path that a row gives for its audio, as written. Raises BadRow."""
    for name in AUDIO_FIELDS:
        value = fields.get(name)
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise BadRow(f"the row has no audio field; name the file in one of {', '.join(AUDIO_FIELDS)}")


def annotation(fields: dict[str, Any], identity: str) -> Annotation:
    """The annotation of a row; `identity` is its id where it declares none. Raises BadRow.

    Numbers in `labels` stay numbers; in tables `labels` and `translation` are JSON cells or columns such as
    `labels.emotion` and `translation.en`.
    """
    if fields.get("offset") not in (None, "", 0, 0.0, "0", "0.0"):
        raise BadRow("the row is a part of a recording (offset); cut the part into a file of its own")
    values = {field: _text(_first(fields, names), field) for field, names in ALIASES.items()}
    gender = (values.pop("gender") or "").lower()
    made = Annotation(
        id=_text(fields.get("id"), "id") or identity,
        text=_text(_first(fields, TEXT_FIELDS), "text"),
        gender=GENDERS.get(gender, gender) or None,
        split=_split(fields.get("split")),
        labels=_labels(fields),
        translation=_translation(fields),
        conversations=_conversations(fields.get("conversations")),
        **values,
    )
    free = [value for value in (made.labels, made.translation, made.conversations) if value]
    try:
        json.dumps(free, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise BadRow(f"a field cannot be written as UTF-8 JSON ({str(error)[:60]}); correct it") from error
    return made


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _text(value: Any, field: str) -> str | None:
    if value is None or isinstance(value, str):
        return _utf8(value.strip(), field) if value is not None else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"the field {field} is a JSON {type(value).__name__}; write text")


def _utf8(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"the field {field} holds half a character (a lone surrogate); correct it") from error
    return text


def _split(value: Any) -> Split | None:
    if value in (None, ""):
        return None
    split = SPLITS.get(str(value).strip().lower())
    if split is None:
        raise BadRow(f"the split {str(value)[:40]!r} is not train, dev or test; correct it or leave it empty")
    return split


def _scalar(value: Any) -> Any:
    """A table's cell as JSON where it is JSON (numbers, lists, objects), else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return _json(value)
    except (ValueError, RecursionError):
        return value


def _dotted(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key[len(name) + 1 :]: value for key, value in fields.items() if key.startswith(name + ".")}


def _labels(fields: dict[str, Any]) -> dict[str, Any]:
    value = fields.get("labels", fields.get("label"))
    if isinstance(value, str):
        value = _scalar(value) if value.lstrip()[:1] in ("{", "[") else value
    if value is None or value == "":
        labels: dict[str, Any] = {}
    elif isinstance(value, dict):
        labels = {str(key): item for key, item in value.items()}
    else:
        labels = {"label": value}
    return labels | {key: _scalar(item) for key, item in _dotted(fields, "labels").items()}


def _translation(fields: dict[str, Any]) -> dict[str, str]:
    value = _scalar(fields.get("translation")) or {}
    if not isinstance(value, dict):
        raise BadRow('the field translation must name languages, as in {"en": "an apple"}')
    both = value | _dotted(fields, "translation")
    texts = {str(key): _text(item, f"translation.{key}") for key, item in both.items()}
    return {key: text for key, text in texts.items() if text}


def _conversations(value: Any) -> list[dict[str, Any]] | None:
    value = _scalar(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRow("the field conversations must be a list of chat messages")
    return value
