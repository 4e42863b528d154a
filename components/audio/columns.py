"""Which columns of a Hugging Face table say what: the audio, the fields of an annotation, the names of classes."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, NamedTuple

from components.audio.manifests import AUDIO_FIELDS, MAX_LINE, parse_json
from components.audio.names import LEADS_OUT, unopened
from components.audio.rows import ALIASES, TEXT_FIELDS, BadRow
from infra import storage

if TYPE_CHECKING:
    import pyarrow as pa

INFO = "dataset_info.json"
OTHER_FIELDS = ("id", "split", "labels", "label", "translation", "conversations", "offset", "duration")
FIELDS = {*OTHER_FIELDS, *TEXT_FIELDS, *(name for names in ALIASES.values() for name in names)}
NO_AUDIO = f"no column holds audio; name one audio (or {', '.join(AUDIO_FIELDS[1:])}), with paths or {{bytes, path}}"


class Columns(NamedTuple):
    """What is read of a table."""

    audio: str
    nested: bool  # cells {bytes, path}
    fields: list[str]
    classes: dict[str, list[str]]  # names of the integers in a column


def audio_columns(root: str, name: str, schema: pa.Schema) -> Columns:
    """Which columns are read. Raises BadRow if none holds audio."""
    features = _features(root, name, schema)
    kinds = {column: feature.get("_type") for column, feature in features.items() if isinstance(feature, dict)}
    unique = [column for column in schema.names if schema.names.count(column) == 1]
    able = [column for column in unique if _holds_audio(schema.field(column).type)]
    named = [column for wanted in AUDIO_FIELDS for column in able if column.lower() == wanted]
    structs = [column for column in able if _is_cell(schema.field(column).type)]
    declared = [column for column in able if kinds.get(column) == "Audio"]
    others = [column for column in structs if kinds.get(column, "Audio") == "Audio" and "image" not in column.lower()]
    audio = next(iter(declared or named or others), None)
    if audio is None:
        raise BadRow(NO_AUDIO)
    classes = {column: _class_names(features.get(column)) for column in unique}
    known = {column for column in unique if column.lower() in FIELDS or column.startswith(("labels.", "translation."))}
    fields = [column for column in unique if column != audio and (column in known or classes[column])]
    named_classes = {column: found for column, found in classes.items() if found}
    return Columns(audio, _is_cell(schema.field(audio).type), fields, named_classes)


def _is_cell(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
        for field in kind.fields
    )


def _holds_audio(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, _is_cell)
    return any(test(kind) for test in tests)


def json_file(root: str, name: str) -> dict[str, Any]:
    """The object in a JSON file beside a table. Raises BadRow; OSError for a store that cannot be reached."""
    url = storage.join(root, name)
    try:
        if storage.leads_out(root, name, last=True):
            raise BadRow(f"{name}: {LEADS_OUT}")
        if storage.size(url) > 16 * MAX_LINE:
            raise ValueError("it is too large")
        value = parse_json(storage.read_bytes(url).decode())
    except OSError as error:
        raise BadRow(f"{name}: {unopened(root, error)}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(f"{name} is not JSON ({str(error)[:80]}); copy it again") from error
    return value if isinstance(value, dict) else {}


def _features(root: str, name: str, schema: pa.Schema) -> dict[str, Any]:
    """The features that the table itself declares, or `dataset_info.json` in its folder."""
    noted = (schema.metadata or {}).get(b"huggingface")
    if noted:
        try:
            features = parse_json(noted.decode())["info"]["features"]
            if isinstance(features, dict):
                return features
        except (ValueError, RecursionError, KeyError, TypeError):
            pass  # of another program, or of an older datasets: the file beside it says the same
    beside = posixpath.join(posixpath.dirname(name), INFO)
    features = json_file(root, beside).get("features") if storage.exists(storage.join(root, beside)) else None
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> list[str]:
    while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]  # a list of labels
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def named_fields(row: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """Fields of a row by lower-case name; integers of classes become names, in `labels` where no field is called so."""
    fields: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    for column in columns.fields:
        value = row[column]
        names = columns.classes.get(column)
        if names:
            value = [_class(item, names) for item in value] if isinstance(value, list) else _class(value, names)
        if value is None:
            continue
        if names and (column.lower() not in FIELDS or column.lower() in ("label", "labels")):
            labels[column] = value
        else:
            fields[column.lower()] = value
    if labels:
        given = fields.pop("labels", None)
        given = {} if given is None else given if isinstance(given, dict) else {"labels": given}
        fields["labels"] = given | labels
    return fields


def _class(value: Any, names: list[str]) -> Any:
    """The name of an integer; -1 is none, as in test sets whose labels are secret."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None
