"""What one row of a manifest, a table or a tar says of a recording: where its audio is, and its annotation."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from components.audio.manifests import AUDIO_FIELDS, parse_json
from components.schema import Annotation, MediaKind, Reject, Split, slim
from infra import storage

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
SHARED = 100  # letters of a speaker, language, source and so on up to which it is kept once for all rows
MAX_LISTED = 100_000  # broken rows of one file that are listed one by one


class BadRow(ValueError):
    """A row that is set aside; its text is the reason."""


class FoundMedia(NamedTuple):
    """A picture or a video that a row names; its fields as those of Found."""

    kind: MediaKind
    path: str
    inside: str | None = None
    digest: str = ""


class Found(NamedTuple):
    """A row before its file was looked at."""

    path: str  # relative to the folder of the data
    annotation: Annotation
    place: str = ""  # manifest and line that name it
    text_path: str = ""  # x.txt beside x.wav
    start: float = 0.0  # seconds
    duration: float | None = None  # seconds; None: to the end
    inside: str | None = None  # where in the container `path` its audio is
    digest: str = ""  # of the audio, as Recording.digest, where it was read already
    media: tuple[FoundMedia, ...] = ()


def gather(items: Iterable[Found | Reject], name: str) -> tuple[list[Found], list[Reject]]:
    """Rows and rejects of the file `name` apart; broken rows beyond MAX_LISTED are counted in one last reject."""
    found: list[Found] = []
    rejects: list[Reject] = []
    more = 0
    for item in items:
        if isinstance(item, Found):
            found.append(item)
        elif len(rejects) < MAX_LISTED:
            rejects.append(item)
        else:
            more += 1
    if more:
        rejects.append(rejected(name, f"{more:,} more of its rows are broken in such ways; correct the file"))
    return found, rejects


def rejected(original: str, reason: str, identity: str = "") -> Reject:
    """A reject that can be written as UTF-8, whatever the names hold."""
    return Reject(original=plain(original), id=plain(identity or original), reason=plain(reason))


# ---- paths ----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text that can be written as UTF-8, for a report about one that cannot."""
    return text.encode("utf-8", "replace").decode()


def stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def within(root: str, folder: str, written: str, names: frozenset[str] = frozenset()) -> str:
    """The path of a row, relative to the data folder `root`. Raises BadRow if it leads out of it.

    A relative path counts from `folder`, where its manifest lies; or from `root`, if only there is such a file
    among `names`: Kaldi and Lhotse write paths from the folder in which they ran.
    """
    if "\0" in written or plain(written) != written:
        raise BadRow("the path holds characters that no file name can hold; correct it")
    path = posixpath.join(folder, written)
    whole = written.removeprefix("file://") if storage.is_local(root) else written
    if whole.startswith("/") or "://" in whole:
        path = next(
            (whole[len(base) + 1 :] for base in _absolute(root, os.getcwd()) if whole.startswith(base + "/")), whole
        )
    forward = path.replace("\\", "/")
    elsewhere = "://" in path or forward.startswith("/") or forward[1:3] == ":/"
    if elsewhere or posixpath.normpath(forward).split("/")[0] == "..":
        short = written if len(written) < 200 else written[:200] + "..."
        raise BadRow(
            f"the path leads out of the data folder ({short}); move the file below it, "
            "or give the folder above both as --data"
        )
    path = posixpath.normpath(path)
    return posixpath.normpath(written) if path not in names and posixpath.normpath(written) in names else path


@lru_cache(maxsize=8)
def _absolute(root: str, _working: str) -> list[str]:
    """Ways in which a row may spell the data folder in full, seen from the working folder."""
    if not storage.is_local(root):
        return [root.rstrip("/")]
    local = storage.local_path(root)
    return [str(local.absolute()), str(local.resolve())]


def with_split(noted: Annotation, path: str) -> Annotation:
    """An undeclared split is taken from a folder called train, dev or test, as audiofolder does."""
    splits = [SPLITS[part.lower()] for part in path.split("/")[:-1] if part.lower() in SPLITS]
    return noted.model_copy(update={"split": splits[-1]}) if splits and noted.split is None else noted


def split_in_name(path: str) -> Split | None:
    """The split that a file is named after (`train-00000-of-00002.parquet`, `cuts_dev-clean.jsonl`), or its folder."""
    for part in reversed(path.split("/")):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]
        if words:
            return SPLITS[words[0]]
    return None


# ---- fields ---------------------------------------------------------------------------------------------------------


def audio_path(fields: dict[str, Any]) -> str:
    """The path that a row gives for its audio, as written. Raises BadRow."""
    for name in AUDIO_FIELDS:
        value = fields.get(name)
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str) and value.strip():
            return value.strip()
    beside = " and ".join(name for name in ("image", "video") if fields.get(name))
    lacks = f"names its {beside} but no audio" if beside else "has no audio field"
    raise BadRow(f"the row {lacks}; name the file in one of {', '.join(AUDIO_FIELDS)}")


def part_of_file(fields: dict[str, Any]) -> tuple[float, float | None] | None:
    """Start and duration in seconds if the row is a part of its file, else None. Raises BadRow.

    Only a row with an `offset` is (NeMo): without one, `duration` says how long the whole file is.
    """
    offset = fields.get("offset")
    if offset in (None, ""):
        return None
    duration = fields.get("duration")
    length = None if duration in (None, "") else seconds(duration, "duration")
    if length == 0:
        raise BadRow("the row is a part that lasts 0 seconds; correct its duration")
    return seconds(offset, "offset"), length


def seconds(value: Any, field: str) -> float:
    """A number that is no less than 0. Raises BadRow."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise BadRow(f"the {field} {str(value)[:40]!r} is not a number of seconds from 0; correct it")
    return number


def annotation(fields: dict[str, Any], identity: str) -> Annotation:
    """The annotation of a row; `identity` is its id where it declares none. Raises BadRow.

    Numbers in `labels` stay numbers; in tables `labels` and `translation` are JSON cells or columns such as
    `labels.emotion` and `translation.en`.
    """
    values = {field: _shared(_text(_first(fields, names), field)) for field, names in ALIASES.items()}
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
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"a field cannot be written as UTF-8 JSON ({str(error)[:60]}); correct it") from error
    return slim(made)


def _shared(text: str | None) -> str | None:
    """One string in memory for all rows that say the same."""
    return text if text is None or len(text) > SHARED else sys.intern(text)


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
        return parse_json(value)
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
        labels = {sys.intern(str(key)): item for key, item in value.items()}
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
