"""Tars of samples as WebDataset reads them: neighbours that share a name up to its first dot.

Format: https://github.com/webdataset/webdataset#the-webdataset-format and POSIX ustar and pax. Nothing is written to
disk: a recording is known by where its bytes lie in the tar.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from blake3 import blake3

from components.audio.identity import KIND
from components.audio.inside import Container
from components.audio.manifests import MAX_LINE, parse_json
from components.audio.media import KINDS, SUFFIXES
from components.audio.names import hidden
from components.audio.rows import BadRow, Found, FoundMedia, annotation, gather, part_of_file, rejected, split_in_name
from components.schema import Reject
from infra import storage

BLOCK = tarfile.BLOCKSIZE
NOTES = ("json", "txt", "cls")
AGAIN = "copy or write it again"


class BadTar(ValueError):
    """A tar that cannot be read further."""


class Member(NamedTuple):
    """A member of a tar."""

    name: str
    offset: int  # of its bytes
    size: int
    fault: str = ""


class Sample(NamedTuple):
    """Neighbours of one name."""

    key: str
    audio: list[Member]
    media: list[Member]  # that cannot be its audio
    notes: dict[str, bytes]
    faults: list[tuple[str, str]]  # member and reason
    names: set[str]  # of audio and media


def tar_samples(root: str, name: str, suffixes: tuple[str, ...]) -> tuple[list[Found], list[Reject]]:
    """A recording for each sample of the tar `name` with a member of one of `suffixes`, and what was set aside."""
    return gather(_recordings(root, name, suffixes), name)


def _recordings(root: str, name: str, suffixes: tuple[str, ...]) -> Iterator[Found | Reject]:
    with Container(storage.join(root, name)) as container:
        local = storage.is_local(root)
        sample: Sample | None = None
        seen: set[str] = set()
        try:
            for member in members(container.file, container.size):
                key, suffix = _key(member.name)
                if not suffix or hidden(member.name):
                    if member.fault:
                        yield rejected(f"{name}: {member.name}", member.fault, key)
                    continue
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield from _recording(sample, name, container.file if local else None)
                    sample = Sample(key, [], [], {}, [], set())
                    again = key in seen
                    seen.add(key)
                _add(sample, member, suffix, suffixes, container.file, again)
        except (BadTar, OSError) as error:
            if container.error:
                raise container.error from None
            lost = f", and its last sample {sample.key} may be cut" if sample is not None else ""
            yield rejected(name, f"{error}{lost}; {AGAIN}")
            return
        if sample is not None:
            yield from _recording(sample, name, container.file if local else None)


def _add(sample: Sample, member: Member, suffix: str, suffixes: tuple[str, ...], file: BinaryIO, again: bool) -> None:
    fault = member.fault
    if not fault and again:
        fault = "the tar has samples of this name in two places; give each its own"
    is_audio = "." + suffix.rpartition(".")[2] in suffixes
    if fault:
        sample.faults.append((member.name, fault))
    elif suffix in sample.notes or member.name in sample.names:
        sample.faults.append((member.name, "the tar has a member of this name already; remove one of the two"))
    elif is_audio:
        sample.audio.append(member)
        sample.names.add(member.name)
    elif suffix in SUFFIXES:
        sample.media.append(member)
        sample.names.add(member.name)
    elif suffix in NOTES:
        if member.size > MAX_LINE:
            fault = f"the member is larger than {MAX_LINE >> 20} MiB; shorten its fields"
            sample.faults.append((member.name, fault))
        else:
            file.seek(member.offset)
            sample.notes[suffix] = file.read(member.size)


def _recording(sample: Sample, name: str, local: BinaryIO | None) -> Iterator[Found | Reject]:
    place = f"{name}: {sample.key}"
    for broken, fault in sample.faults:
        yield rejected(f"{name}: {broken}", fault, sample.key)
    if not sample.audio:
        if not sample.faults:
            lacks = "only an image or a video and no audio" if sample.media else "no audio"
            yield rejected(place, f"the sample has {lacks}; add a member such as .flac or .wav", sample.key)
        return
    kept: dict[str, Member] = {}  # the first of each kind
    for kind, member in _kinds(sample):
        first = kept.setdefault(kind, member)
        if first is not member:
            fault = f"the sample has {kind} in {posixpath.basename(first.name)} already; make it a sample of its own"
            yield rejected(f"{name}: {member.name}", fault, sample.key)
    if any(broken.rpartition(".")[2].lower() in (*NOTES, *SUFFIXES) for broken, _ in sample.faults):
        yield rejected(place, "a member that belongs to the audio is set aside; correct that one", sample.key)
        return
    try:
        fields = _fields(sample.notes)
        start, duration = part_of_file(fields) or (0.0, None)
        noted = annotation(fields, sample.key)
        if noted.split is None:
            noted = noted.model_copy(update={"split": split_in_name(name)})
    except BadRow as error:
        yield rejected(place, str(error), sample.key)
        return
    media = tuple(FoundMedia(kind, name, *_spot(kept[kind], local)) for kind in KINDS if kind in kept)
    inside, digest = _spot(kept["audio"], local)
    yield Found(name, noted, place, start=start, duration=duration, inside=inside, digest=digest, media=media)


def _fields(notes: dict[str, bytes]) -> dict[str, Any]:
    """Fields of a sample's record, with text from `.txt` and a label from `.cls` where it has none. Raises BadRow."""
    fields: dict[str, Any] = {}
    try:
        if "json" in notes:
            value = parse_json(notes["json"].decode("utf-8-sig"))
            if not isinstance(value, dict):
                raise BadRow(f"its .json is a JSON {type(value).__name__}, not an object with fields; correct it")
            fields = {key.strip().lower(): item for key, item in value.items()}
        if "txt" in notes and fields.get("text") is None:
            fields["text"] = " ".join(notes["txt"].decode("utf-8-sig").split())
        if "cls" in notes and fields.get("label") is None and fields.get("labels") is None:
            label = notes["cls"].decode("utf-8-sig").strip()
            fields["label"] = int(label) if re.fullmatch(r"-?\d{1,18}", label) else label
    except UnicodeDecodeError:
        raise BadRow("its .json, .txt or .cls is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(f"its .json is not JSON ({str(error)[:80]}); correct it") from error
    return fields


def _kinds(sample: Sample) -> Iterator[tuple[str, Member]]:
    """What each member is: x.mp4 beside other audio is a video; its sound is the recording where there is no other."""
    films = [member for member in sample.audio if _key(member.name)[1] in SUFFIXES]
    sounds = [member for member in sample.audio if _key(member.name)[1] not in SUFFIXES]
    if not sounds:
        films, sounds = sounds, films
    yield from (("audio", member) for member in sounds)
    yield from ((SUFFIXES[_key(member.name)[1]], member) for member in (*films, *sample.media))


def _spot(member: Member, file: BinaryIO | None) -> tuple[str, str]:
    """Where a member lies, and its digest if the tar is local."""
    return f"bytes {member.offset} {member.size}", _digest(file, member) if file else ""


def _digest(file: BinaryIO, member: Member) -> str:
    total = blake3()
    file.seek(member.offset)
    left = member.size
    while left and (data := file.read(min(left, 1 << 20))):
        total.update(data)
        left -= len(data)
    return f"{KIND}{total.hexdigest()}"


def _key(name: str) -> tuple[str, str]:
    """The sample's key and the member's suffix in lower case: the name is cut at the first dot of its last part."""
    folder, file = posixpath.split(name)
    first, _, suffix = file.partition(".")
    return posixpath.join(folder, first), suffix.lower()


# ---- the format -----------------------------------------------------------------------------------------------------


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Files and links in a tar of `size` bytes, with a fault for those that are not taken. Raises BadTar."""
    at = 0
    longer: dict[str, str] = {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) == BLOCK and not any(block):
            return
        if len(block) < BLOCK:
            raise BadTar(f"the tar breaks off after {at:,} bytes" if at else _damage(block, at, "it is too short"))
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise BadTar(_damage(block, at, str(error))) from error
        at += BLOCK
        length = 0 if info.type in _EMPTY else info.size
        if info.type not in (*_EMPTY, *_EXTENDED):
            length = int(longer.pop("size", length))
        if length < 0 or at + length > size:
            raise BadTar(f"the tar breaks off: {info.name[:80]!r} is said to have {length:,} bytes, beyond its end")
        if info.type in _EXTENDED:
            if length > MAX_LINE:
                raise BadTar(f"a header of the tar has {length:,} bytes, at most {MAX_LINE:,} are read")
            longer |= _extended(info.type, file.read(length))
        elif not info.isdir():
            name = longer.pop("path", info.name)
            yield Member(name.removeprefix("./"), at, length, _fault(name, info, longer))
            longer = {}
        else:
            longer = {}
        at += -(-length // BLOCK) * BLOCK


_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_RECORD = re.compile(rb"(\d{1,7}) ([^=]{1,200})=")  # of a pax header: its length, a name, a value
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


def _damage(block: bytes, at: int, error: str) -> str:
    for magic, what in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if at == 0 and block.startswith(magic):
            return f"the tar is packed with {what}: unpack that"
    return f"the tar is damaged at byte {at:,} ({error})" if at else f"this is not a tar ({error})"


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Name and size that a header before the header declares (GNU `L`, pax `x`)."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    fields: dict[str, str] = {}
    at = 0
    while kind in _PAX and at < len(data):
        record = _RECORD.match(data, at)
        end = at + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(data):
            raise BadTar("an extended header of the tar is damaged")
        name, value = record[2].decode("utf-8", "replace"), data[record.end() : end - 1]
        fields[name] = value.decode("utf-8", "surrogateescape")
        at = end
    if not fields.get("size", "0").isdecimal() or len(fields.get("size", "0")) > 18:
        raise BadTar("an extended header of the tar is damaged")
    return {key: value for key, value in fields.items() if key in ("path", "size") or key.startswith("GNU.sparse")}


def _fault(name: str, info: tarfile.TarInfo, longer: dict[str, str]) -> str:
    if name.startswith("/") or ".." in re.split(r"[/\\]", name) or "\0" in name or name[1:3] in (":\\", ":/"):
        return "the name leads out of the tar (it is absolute or holds ..); write the tar with names below its folder"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8; rename the member"
    if info.issym() or info.islnk():
        return "the member is a link; write the tar with the files themselves (tar --dereference)"
    if any(key.startswith("GNU.sparse") for key in longer) or info.type == tarfile.GNUTYPE_SPARSE:
        return "the member is a sparse file; write the tar without --sparse"
    return "" if info.isreg() else "the member is a device or a pipe, not a file; leave it out"
