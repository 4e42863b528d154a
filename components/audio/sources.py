"""From a folder of audio, or a manifest of one, to the recordings in it and the inputs that were set aside."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from components.audio.corpora import WAV_SCP, cut_row, is_cut, kaldi
from components.audio.identity import digest_at
from components.audio.ids import unique
from components.audio.inside import MAX_BYTES
from components.audio.manifests import MANIFEST_NAMES, MANIFEST_SUFFIXES, MAX_LINE, MAX_MANIFEST, TOO_LARGE, read_rows
from components.audio.media import row_media
from components.audio.names import LEADS_OUT, Fence, hidden, name_faults, spellings, unopened
from components.audio.rows import (
    BadRow,
    Found,
    FoundMedia,
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
from components.schema import Annotation, Media, Recording, Reject, slim
from infra import storage

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph"),
    *(".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".caf"),  # refused by name when they are decoded
)
CONTAINER_SUFFIXES = (".tar", ".parquet", ".arrow")
MATTER = (*AUDIO_SUFFIXES, *CONTAINER_SUFFIXES, ".txt")
THREADS = 16
WAITING = 512  # files that threads are told of at a time: a million at once would take a gigabyte

Read = tuple[list[Found], list[Reject]]


class Opened(NamedTuple):
    """What was found at the path of a row."""

    path: str  # as it is spelled in the storage
    fingerprint: str = ""
    text: str | None = None
    fault: str = ""
    url: str = ""


def read_sources(data: str, trust: bool = False) -> tuple[list[Recording], list[Reject]]:
    """Every recording of `data`, in the order of its manifest or else of its names, and what was set aside and why.

    `data` is a folder at any fsspec URL, or one file of it. A folder is read by its manifest (`manifest.jsonl`,
    `.json`, `.csv`, `.tsv`, or an audiofolder's `metadata.csv`, `.jsonl`; else NeMo's `train_manifest.json` and the
    like, Lhotse's `*cuts*.jsonl.gz`, or Kaldi's `wav.scp`), which speaks for everything below it; sub-folders with
    manifests of their own are joined. What no manifest speaks for is taken as it lies: tars of WebDataset samples,
    tables of Hugging Face data sets (`.parquet`, `.arrow`), and audio files, with the text of `x.txt` for `x.wav`.
    Nothing is unpacked or run. With `trust` FLAC is known by its header, see components/audio/identity.py. Raises
    ValueError only if there is nothing to read at all.
    """
    root, found, rejects = _look(data)
    recordings: list[Recording] = []
    looked = _open_all(root, found, data, trust)
    found.reverse()
    while found:  # a million rows are let go one by one
        item = found.pop()
        opened = Opened(item.path) if item.digest else looked[item.path, item.text_path]
        beside = [(one, Opened(one.path) if one.digest else looked[one.path, ""]) for one in item.media]
        faults = [f"its {one.kind} {one.path}: {seen.fault}" for one, seen in beside if seen.fault]
        if fault := opened.fault or "".join(faults[:1]):
            reason = f"{fault} ({item.place})" if item.place else fault
            rejects.append(Reject(original=item.path, id=item.annotation.id, reason=reason))
            continue
        noted = item.annotation.model_copy(update={"text": opened.text}) if opened.text is not None else item.annotation
        times = {"start": item.start, "duration": item.duration}
        media = tuple(Media(kind=one.kind, **_placed(root, one, seen)) for one, seen in beside)
        recordings.append(slim(Recording(**_placed(root, item, opened), annotation=noted, media=media, **times)))
    del looked
    return unique(recordings, root, rejects), rejects


def _placed(root: str, item: Found | FoundMedia, opened: Opened) -> dict[str, Any]:
    """Address, digest and place inside of what a row names."""
    part = digest_bytes(f"{opened.fingerprint} {item.inside}".encode()) if item.inside else opened.fingerprint
    url = opened.url or storage.join(root, opened.path)  # one string for all parts of a file
    return {"url": url, "digest": item.digest or part, "inside": item.inside}


def _look(data: str) -> tuple[str, list[Found], list[Reject]]:
    """The folder that paths are relative to, the rows in it and the broken ones."""
    one = data.lower().endswith((*MANIFEST_SUFFIXES, *AUDIO_SUFFIXES, *CONTAINER_SUFFIXES, f"/{WAV_SCP}"))
    if (one or data == WAV_SCP) and storage.exists(data) and not storage.list_names(data):
        folder, _, name = data.rpartition("/")
        root = folder or ("/" if data.startswith("/") else ".")
        return root, *_read(root, [name], [name] if _is_manifest(name) else [])
    names = [name for name in storage.find(data, inside=True) if not hidden(name)]
    faults = name_faults(data, names)
    names = [name for name in names if name not in faults]
    found, rejects = _read(data, names, _manifests(names))
    rejects = [*(rejected(name, why, stem(name)) for name, why in faults.items() if _matters(name)), *rejects]
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
        return [], [rejected(name, unopened(root, error))]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _matters(name: str) -> bool:
    """Whether a name would have been read, or is a link to a folder."""
    return name.endswith("/") or _suffix(name) in MATTER or _rank(name) is not None


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
                found = _row(path, fields, place)._replace(media=row_media(root, folder, fields, names))
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
    for name in sorted(name for name in names if _suffix(name) in AUDIO_SUFFIXES):
        identity = posixpath.splitext(name)[0]
        noted = with_split(Annotation(id=identity), name)
        found.append(Found(name, noted, text_path=texts.get(identity, "")))
    return found, []


def _open_all(root: str, found: list[Found], data: str, trust: bool) -> dict[tuple[str, str], Opened]:
    """What lies at each path and text path of a row; a file that several rows name is read once."""
    named = dict.fromkeys((item.path, item.text_path) for item in found if not item.digest)
    wanted = list(named | dict.fromkeys((one.path, "") for item in found for one in item.media if not one.digest))
    opened: dict[tuple[str, str], Opened] = {}
    fence = Fence(root, named=data)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(wanted), WAITING):
            some = wanted[start : start + WAITING]
            opened.update(zip(some, pool.map(lambda paths: _open(fence, paths[0], paths[1], trust), some), strict=True))
    return opened


def _open(fence: Fence, path: str, text_path: str, trust: bool) -> Opened:
    """Fingerprint of the file at `path`, under the other ways that its name may be spelled if need be."""
    root = fence.root
    for spelling in spellings(path):
        url = storage.join(root, spelling)
        try:
            if fence.outside(spelling):
                return Opened(path, fault=LEADS_OUT)
            if storage.is_local(url) and storage.size(url) > MAX_BYTES:  # before its digest: it may be of holes alone
                return Opened(path, fault=f"the file is larger than {MAX_BYTES >> 20} MiB; cut it into clips")
            fingerprint = digest_at(url, trust)
            if text_path and storage.size(storage.join(root, text_path)) > MAX_LINE:
                return Opened(path, fault=f"its text {text_path} is larger than {MAX_LINE >> 20} MiB; shorten it")
            text = storage.read_bytes(storage.join(root, text_path)).decode("utf-8-sig") if text_path else None
            return Opened(spelling, fingerprint, " ".join(text.split()) if text is not None else None, url=url)
        except UnicodeDecodeError:
            return Opened(path, fault=f"its text {text_path} is not UTF-8; save it as UTF-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return Opened(path, fault=unopened(root, error))
    return Opened(path, fault="the file is missing; copy it there or remove its row")
