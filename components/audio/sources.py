"""From a folder of audio, or a manifest of one, to the recordings in it and the inputs that were set aside."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from components.audio.corpora import WAV_SCP, cut_row, is_cut, kaldi
from components.audio.manifests import MANIFEST_NAMES, MANIFEST_SUFFIXES, MAX_MANIFEST, TOO_LARGE, read_rows
from components.audio.rows import (
    BadRow,
    Found,
    annotation,
    audio_path,
    gather,
    part_of_file,
    plain,
    rejected,
    split_in_name,
    stem,
    with_split,
    within,
)
from components.audio.tables import table_rows, tables_in
from components.audio.tars import tar_samples
from components.digest import digest_bytes
from components.schema import Annotation, Recording, Reject
from infra import storage

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph"),
    *(".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".caf"),  # refused by name when they are decoded
)
CONTAINER_SUFFIXES = (".tar", ".parquet", ".arrow")
THREADS = 16

Read = tuple[list[Found], list[Reject]]


class Opened(NamedTuple):
    """What was found at the path of a row."""

    path: str  # as it is spelled in the storage
    fingerprint: str = ""
    text: str | None = None
    fault: str = ""


def read_sources(data: str) -> tuple[list[Recording], list[Reject]]:
    """Every recording of `data`, in the order of its manifest or else of its names, and what was set aside and why.

    `data` is a folder at any fsspec URL, or one file of it. A folder is read by its manifest (`manifest.jsonl`,
    `.json`, `.csv`, `.tsv`, or an audiofolder's `metadata.csv`, `.jsonl`; else NeMo's `train_manifest.json` and the
    like, Lhotse's `*cuts*.jsonl.gz`, or Kaldi's `wav.scp`), which speaks for everything below it; sub-folders with
    manifests of their own are joined. What no manifest speaks for is taken as it lies: tars of WebDataset samples,
    tables of Hugging Face data sets (`.parquet`, `.arrow`), and audio files, with the text of `x.txt` for `x.wav`.
    Nothing is unpacked or run. Raises ValueError only if there is nothing to read at all.
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
        digest = item.digest or opened.fingerprint
        if item.inside and not item.digest:
            digest = digest_bytes(f"{opened.fingerprint} {item.inside}".encode())
        url = storage.join(root, opened.path)
        made = Recording(url=url, digest=digest, annotation=noted, start=item.start, duration=item.duration)
        recordings.append(made.model_copy(update={"inside": item.inside}) if item.inside else made)
    return _unique(recordings, root, rejects), rejects


def _look(data: str) -> tuple[str, list[Found], list[Reject]]:
    """The folder that paths are relative to, the rows in it and the broken ones."""
    one = data.lower().endswith((*MANIFEST_SUFFIXES, *AUDIO_SUFFIXES, *CONTAINER_SUFFIXES, f"/{WAV_SCP}"))
    if (one or data == WAV_SCP) and storage.exists(data) and not storage.list_names(data):
        folder, _, name = data.rpartition("/")
        root = folder or ("/" if data.startswith("/") else ".")
        return root, *_read(root, [name], [name] if _is_manifest(name) else [])
    names = [name for name in storage.find(data) if not _hidden(name)]
    found, rejects = _read(data, names, _manifests(names))
    if not found and not rejects:
        raise ValueError(
            f"nothing to read at {data}: looked for {', '.join(MANIFEST_NAMES)}, for cuts, {WAV_SCP}, tars and tables, "
            f"and for audio files ({', '.join(AUDIO_SUFFIXES[:6])} ...) in it and below; check the path"
        )
    return data, found, rejects


def _read(root: str, names: list[str], manifests: list[str]) -> Read:
    """Rows of the manifests, then of the tars, tables and audio files among `names` that no manifest speaks for."""
    known = frozenset(names)
    read = [_manifest(root, name, known) for name in manifests]
    folders = {posixpath.dirname(name) for name in manifests}
    rest = [name for name in names if folders.isdisjoint(_parents(name))]
    for name in rest:
        if _suffix(name) == ".tar":
            read.append(_guarded(root, name, partial(tar_samples, root, name, AUDIO_SUFFIXES)))
    tables, missing = tables_in(root, rest)
    read.append(([], missing))
    for name in tables:
        read.append(_guarded(root, name, partial(table_rows, root, name, known)))
    spoken = {item.path for items, _ in read for item in items}
    read.append(_bare([name for name in rest if name not in spoken]))
    return [item for items, _ in read for item in items], [reject for _, some in read for reject in some]


def _guarded(root: str, name: str, read: Callable[[], Read]) -> Read:
    """What `read` finds in a file, or one reject where the file cannot be opened. Raises OSError for a store."""
    try:
        return read()
    except OSError as error:
        if not storage.is_local(root) and not isinstance(
            error, FileNotFoundError | PermissionError | IsADirectoryError
        ):
            raise
        return [], [rejected(name, f"the file cannot be opened ({error.strerror or type(error).__name__}); check it")]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _parents(name: str) -> list[str]:
    """Folders above `name`, the nearest first, "" for the data folder itself."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _is_manifest(name: str) -> bool:
    file = posixpath.basename(name).lower()
    return file == WAV_SCP or file.endswith(MANIFEST_SUFFIXES)


def _rank(name: str) -> int | None:
    """How much a manifest in a folder counts, 0 the most; None for other files."""
    file = posixpath.basename(name)
    if file in MANIFEST_NAMES:
        return MANIFEST_NAMES.index(file)
    lines = file.lower().endswith((".jsonl", ".jsonl.gz"))
    if "manifest" in file.lower() and (lines or file.lower().endswith(".json")) and split_in_name(file):
        return len(MANIFEST_NAMES)
    if "cuts" in file.lower() and lines:
        return len(MANIFEST_NAMES) + 1
    return len(MANIFEST_NAMES) + 2 if file == WAV_SCP else None


def _manifests(names: list[str]) -> list[str]:
    """The manifests to read: of each folder those that count the most, and none below a folder that has one."""
    by_folder: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        rank = _rank(name)
        if rank is not None:
            by_folder.setdefault(posixpath.dirname(name), []).append((rank, name))
    top = [folder for folder in sorted(by_folder) if not folder or by_folder.keys().isdisjoint(_parents(folder))]
    return [name for folder in top for rank, name in sorted(by_folder[folder]) if rank == min(by_folder[folder])[0]]


def _manifest(root: str, name: str, names: frozenset[str]) -> Read:
    if posixpath.basename(name) == WAV_SCP:
        return _guarded(root, name, lambda: kaldi(root, posixpath.dirname(name), names))
    return _guarded(root, name, lambda: gather(_manifest_rows(root, name, names), name))


def _manifest_rows(root: str, name: str, names: frozenset[str]) -> Iterator[Found | Reject]:
    url = storage.join(root, name)
    if storage.size(url) > MAX_MANIFEST:
        yield rejected(name, TOO_LARGE)
        return
    folder = posixpath.dirname(name)
    split = split_in_name(posixpath.basename(name)) if len(names) > 1 else None  # one that is named alone says nothing
    for line, fields, fault in read_rows(storage.read_bytes(url), name):
        place = f"{name}:{line}"
        path = ""
        try:
            if fault:
                raise BadRow(fault)
            if is_cut(fields):
                found = cut_row(root, folder, fields, place, names)
            else:
                path = audio_path(fields)
                path = within(root, folder, path, names)
                found = _row(path, fields, place)
            if split and found.annotation.split is None:
                found = found._replace(annotation=found.annotation.model_copy(update={"split": split}))
            yield found
        except BadRow as error:
            yield rejected(path or place, str(error), _identity(fields) or place)


def _row(path: str, fields: dict[str, object], place: str) -> Found:
    part = part_of_file(fields)
    identity = stem(path) if part is None else f"{stem(path)}@{part[0]:.3f}"
    start, duration = part or (0.0, None)
    return Found(path, with_split(annotation(fields, identity), path), place, start=start, duration=duration)


def _identity(fields: dict[str, object]) -> str:
    value = fields.get("id")
    return plain(str(value)) if isinstance(value, str | int) else ""


def _bare(names: list[str]) -> Read:
    """Audio without a manifest, by name, with x.txt as the text of x.wav."""
    texts = {posixpath.splitext(name)[0]: name for name in names if _suffix(name) == ".txt"}
    found: list[Found] = []
    rejects: list[Reject] = []
    for name in sorted(name for name in names if _suffix(name) in AUDIO_SUFFIXES):
        identity = posixpath.splitext(name)[0]
        if plain(name) != name:
            fault = "the name is not UTF-8; rename the file"
            rejects.append(Reject(original=plain(name), id=plain(identity), reason=fault))
            continue
        noted = with_split(Annotation(id=identity), name)
        found.append(Found(name, noted, text_path=texts.get(identity, "")))
    return found, rejects


def _open_all(root: str, found: list[Found]) -> list[Opened]:
    """What lies at each row's path; a file that several rows name is read once."""
    wanted = list(dict.fromkeys((item.path, item.text_path) for item in found if not item.digest))
    with ThreadPoolExecutor(THREADS) as pool:
        opened = dict(zip(wanted, pool.map(lambda paths: _open(root, *paths), wanted), strict=True))
    return [Opened(item.path) if item.digest else opened[item.path, item.text_path] for item in found]


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
    ids: dict[str, int] = {}  # and the number of the latest that wanted it
    seen: set[tuple[object, ...]] = set()
    for recording in recordings:
        noted = recording.annotation
        same = (recording.url, recording.start, recording.duration, recording.inside, noted.model_dump_json())
        if same in seen:
            path = _relative(recording.url, root)
            rejects.append(Reject(original=path, id=noted.id, reason="the row repeats an earlier one; remove it"))
            continue
        seen.add(same)
        identity = _free(noted.id, posixpath.dirname(_relative(recording.url, root)), ids)
        ids[identity] = 1
        if identity != noted.id:
            recording = recording.model_copy(update={"annotation": noted.model_copy(update={"id": identity})})
        kept.append(recording)
    return kept


def _relative(url: str, root: str) -> str:
    return url.removeprefix(storage.join(root, "")).lstrip("/")


def _free(identity: str, folder: str, taken: dict[str, int]) -> str:
    if identity not in taken:
        return identity
    free = inside = f"{folder}/{identity}" if folder and not identity.startswith(folder + "/") else identity
    while free in taken:
        taken[inside] = taken.get(inside, 1) + 1
        free = f"{inside}-{taken[inside]}"
    return free
