"""From a folder of audio, or a manifest of one, to the recordings in it and the inputs that were set aside."""

from __future__ import annotations

import posixpath
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from components.audio.manifests import (
    MANIFEST_NAMES,
    MANIFEST_SUFFIXES,
    SPLITS,
    BadRow,
    annotation,
    audio_path,
    read_rows,
)
from components.schema import Annotation, Recording, Reject
from infra import storage

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph"),
    *(".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".caf"),  # refused by name when they are decoded
)
THREADS = 16


class Found(NamedTuple):
    """A row before its file was looked at."""

    path: str  # relative to the folder of the data
    annotation: Annotation
    place: str = ""  # manifest and line that name it
    text_path: str = ""  # x.txt beside x.wav


class Opened(NamedTuple):
    """What was found at the path of a row."""

    path: str  # as it is spelled in the storage
    fingerprint: str = ""
    text: str | None = None
    fault: str = ""


def read_sources(data: str) -> tuple[list[Recording], list[Reject]]:
    """Every recording of `data`, in the order of its manifest or else of its names, and what was set aside and why.

    `data` is a folder or a manifest at any fsspec URL. A folder is read by its manifest (`manifest.jsonl`, `.json`,
    `.csv`, `.tsv`, or an audiofolder's `metadata.csv`, `.jsonl`), which speaks for everything below it; sub-folders
    with manifests of their own are joined. Audio that no manifest speaks for is taken as it lies, with the text of
    `x.txt` for `x.wav`. Raises ValueError only if there is nothing to read at all.
    """
    root, found, rejects = _look(data)
    recordings: list[Recording] = []
    for item, opened in zip(found, _open_all(root, found), strict=True):
        if opened.fault:
            reason = f"{opened.fault} ({item.place})" if item.place else opened.fault
            rejects.append(Reject(original=item.path, id=item.annotation.id, reason=reason))
            continue
        noted = item.annotation
        if opened.text is not None:
            noted = noted.model_copy(update={"text": opened.text})
        url = storage.join(root, opened.path)
        recordings.append(Recording(url=url, digest=opened.fingerprint, annotation=noted))
    return _unique(recordings, root, rejects), rejects


def _look(data: str) -> tuple[str, list[Found], list[Reject]]:
    """The folder that paths are relative to, the rows in it and the broken ones."""
    suffix = _suffix(data)
    if suffix in (*MANIFEST_SUFFIXES, *AUDIO_SUFFIXES) and storage.exists(data) and not storage.list_names(data):
        root, _, name = data.rpartition("/")
        return root or ".", *(_bare([name]) if suffix in AUDIO_SUFFIXES else _manifest(root or ".", name))
    names = [name for name in storage.find(data) if not _hidden(name)]
    manifests = _manifests(names)
    folders = {posixpath.dirname(name) for name in manifests}
    read = [_manifest(data, name) for name in manifests]
    read.append(_bare([name for name in names if folders.isdisjoint(_parents(name))]))
    found = [item for items, _ in read for item in items]
    rejects = [reject for _, some in read for reject in some]
    if not found and not rejects:
        raise ValueError(
            f"nothing to read at {data}: looked for {', '.join(MANIFEST_NAMES)} and for audio files "
            f"({', '.join(AUDIO_SUFFIXES[:6])} ...) in it and below; check the path"
        )
    return data, found, rejects


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _parents(name: str) -> list[str]:
    """Folders above `name`, the nearest first, "" for the data folder itself."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _manifests(names: list[str]) -> list[str]:
    """The manifests to read, by folder: one a folder, and none below a folder that has one."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        folder, file = posixpath.split(name)
        if file in MANIFEST_NAMES:
            by_folder.setdefault(folder, []).append(name)
    top = [folder for folder in sorted(by_folder) if not folder or by_folder.keys().isdisjoint(_parents(folder))]
    return [min(by_folder[folder], key=lambda name: MANIFEST_NAMES.index(posixpath.basename(name))) for folder in top]


def _manifest(root: str, name: str) -> tuple[list[Found], list[Reject]]:
    found: list[Found] = []
    rejects: list[Reject] = []
    folder = posixpath.dirname(name)
    for line, fields, fault in read_rows(storage.read_bytes(storage.join(root, name)), name):
        place = f"{name}:{line}"
        path = ""
        try:
            if fault:
                raise BadRow(fault)
            path = audio_path(fields)
            path = _inside(root, folder, path)
            noted = _with_split(annotation(fields, posixpath.splitext(path)[0]), path)
            found.append(Found(path, noted, place))
        except BadRow as error:
            rejects.append(Reject(original=_plain(path or place), id=_identity(fields) or place, reason=str(error)))
    return found, rejects


def _identity(fields: dict[str, object]) -> str:
    value = fields.get("id")
    return _plain(str(value)) if isinstance(value, str | int) else ""


def _plain(text: str) -> str:
    """Text that can be written as UTF-8, for a report about one that cannot."""
    return text.encode("utf-8", "replace").decode()


def _inside(root: str, folder: str, written: str) -> str:
    """The path of a row, relative to the data folder. Raises BadRow if it leads out of it."""
    if "\0" in written or _plain(written) != written:
        raise BadRow("the path holds characters that no file name can hold; correct it")
    path = posixpath.join(folder, written)
    if written.startswith("/") or "://" in written:
        path = next((written[len(base) + 1 :] for base in _absolute(root) if written.startswith(base + "/")), written)
    forward = path.replace("\\", "/")
    elsewhere = "://" in path or forward.startswith("/") or forward[1:3] == ":/"
    if elsewhere or posixpath.normpath(forward).split("/")[0] == "..":
        short = written if len(written) < 200 else written[:200] + "..."
        raise BadRow(f"the path leads out of the data folder ({short}); move the file below it and name it from there")
    return posixpath.normpath(path)


def _absolute(root: str) -> list[str]:
    """Ways in which a row may spell the data folder in full."""
    if not storage.is_local(root):
        return [root.rstrip("/")]
    local = storage.local_path(root)
    return [str(local.absolute()), str(local.resolve())]


def _with_split(noted: Annotation, path: str) -> Annotation:
    """An undeclared split is taken from a folder called train, dev or test, as audiofolder does."""
    splits = [SPLITS[part.lower()] for part in path.split("/")[:-1] if part.lower() in SPLITS]
    return noted.model_copy(update={"split": splits[-1]}) if splits and noted.split is None else noted


def _bare(names: list[str]) -> tuple[list[Found], list[Reject]]:
    """Audio without a manifest, by name, with x.txt as the text of x.wav."""
    texts = {posixpath.splitext(name)[0]: name for name in names if _suffix(name) == ".txt"}
    found: list[Found] = []
    rejects: list[Reject] = []
    for name in sorted(name for name in names if _suffix(name) in AUDIO_SUFFIXES):
        identity = posixpath.splitext(name)[0]
        if _plain(name) != name:
            fault = "the name is not UTF-8; rename the file"
            rejects.append(Reject(original=_plain(name), id=_plain(identity), reason=fault))
            continue
        noted = _with_split(Annotation(id=identity), name)
        found.append(Found(name, noted, text_path=texts.get(identity, "")))
    return found, rejects


def _open_all(root: str, found: list[Found]) -> list[Opened]:
    """What lies at each row's path; a file that several rows name is read once."""
    wanted = list(dict.fromkeys((item.path, item.text_path) for item in found))
    with ThreadPoolExecutor(THREADS) as pool:
        opened = dict(zip(wanted, pool.map(lambda paths: _open(root, *paths), wanted), strict=True))
    return [opened[item.path, item.text_path] for item in found]


def _open(root: str, path: str, text_path: str) -> Opened:
    """Fingerprint of the file at `path`, under the other ways that its name may be spelled if need be."""
    spellings = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")), path.replace("\\", "/"))
    for spelling in dict.fromkeys(spellings):
        url = storage.join(root, spelling)
        try:
            fingerprint = storage.fingerprint(url)
            text = storage.read_bytes(storage.join(root, text_path)).decode("utf-8-sig") if text_path else None
            return Opened(spelling, fingerprint, " ".join(text.split()) if text is not None else None)
        except UnicodeDecodeError:
            return Opened(path, fault=f"its text {text_path} is not UTF-8; save it as UTF-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if not storage.is_local(root) and not isinstance(error, PermissionError | IsADirectoryError):
                raise
            return Opened(path, fault=f"the file cannot be opened ({error.strerror or type(error).__name__}); check it")
    return Opened(path, fault="the file is missing; copy it there or remove its row")


def _unique(recordings: list[Recording], root: str, rejects: list[Reject]) -> list[Recording]:
    """Recordings with an id each: a repeated row is set aside, a repeated id gets its folder or a number."""
    kept: list[Recording] = []
    ids: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for recording in recordings:
        noted = recording.annotation
        same = (recording.url, noted.model_dump_json())
        if same in seen:
            path = _relative(recording.url, root)
            rejects.append(Reject(original=path, id=noted.id, reason="the row repeats an earlier one; remove it"))
            continue
        seen.add(same)
        identity = _free(noted.id, posixpath.dirname(_relative(recording.url, root)), ids)
        ids.add(identity)
        if identity != noted.id:
            recording = recording.model_copy(update={"annotation": noted.model_copy(update={"id": identity})})
        kept.append(recording)
    return kept


def _relative(url: str, root: str) -> str:
    return url.removeprefix(storage.join(root, "")).lstrip("/")


def _free(identity: str, folder: str, taken: set[str]) -> str:
    if identity not in taken:
        return identity
    inside = f"{folder}/{identity}" if folder and not identity.startswith(folder + "/") else identity
    number, free = 1, inside
    while free in taken:
        number += 1
        free = f"{inside}-{number}"
    return free
