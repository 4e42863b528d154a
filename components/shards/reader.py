"""Reading audio shards: one clip by its row of the index, or a whole shard to see that it is what the manifest says."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile as sf

from components.audio.exact import plain_samples
from components.digest import digest_bytes, digest_file
from components.schema import SAMPLE_RATE, Clip, MediaKind, ShardInfo
from components.shards.digests import checked
from components.shards.index import find_manifest
from infra.shard_cache import cached_copy, distrust, limit
from infra.storage import is_local, join, local_path, open_read, read_range, shown

BLOCK = 1 << 20  # bytes
REMEDY = "delete it and run the ingest stage again, only this shard is made anew"

Row = Mapping[str, Any]


class ShardReader:
    """Reads clips of the shards below `root_url` by the rows of `read_index`; holds no open file, may be shared.

    A shard on this machine is read once and compared with the sha256 of the manifest beside it, if there is one, before
    its first clip is given. Of a store, the bytes of each clip are fetched; with `whole_shards`, for those who will
    hear most clips and more than once, the shards come into this machine's cache, if they all have room there.
    """

    def __init__(self, root_url: str, whole_shards: bool = False) -> None:
        self.root = root_url
        self.whole_shards = whole_shards and not is_local(root_url)
        self.whole: set[str] = set()  # names of shards that have their sha256, or of which none is known

    def clip(self, row: Row) -> Clip:
        """The record of a clip. ValueError if the shard is damaged or belongs to another index."""
        data = self._member(row, int(row["json_offset"]), int(row["json_size"]))
        try:
            clip = Clip.model_validate_json(data)
        except ValueError as error:
            raise self._damaged(row, f"its record cannot be read: {error}") from error
        if clip.key != row["key"]:
            raise self._damaged(row, f"the record of {clip.key} is where the index says {row['key']}")
        return clip

    def waveform(self, row: Row) -> np.ndarray:
        """Audio `(samples,)` float32 in [-1, 1] at 16 kHz; checked against the digest in the row, if it has one.

        ValueError if the shard is damaged or belongs to another index.
        """
        data = self._member(row, int(row["audio_offset"]), int(row["audio_size"]))
        whole = plain_samples(data)
        if whole is None:
            whole = self._decoded(row, data)
        expected = row.get("audio_digest")
        if expected and not checked(expected, data, whole):
            raise self._damaged(row, "its audio is not what the index says")
        return whole.astype(np.float32) / np.float32(32768.0)

    def _decoded(self, row: Row, data: bytes) -> np.ndarray:
        """`(samples,)` int16 of what is no plain FLAC: Ogg, or damaged, which libsndfile says in words."""
        try:
            with sf.SoundFile(io.BytesIO(data)) as file:
                form = (file.samplerate, file.channels)
                whole: np.ndarray = file.read(dtype="int16")
        except (sf.LibsndfileError, RuntimeError) as error:
            raise self._damaged(row, f"its audio cannot be decoded: {error}") from error
        if form != (SAMPLE_RATE, 1):
            raise self._damaged(row, f"its audio has {form[0]} Hz and {form[1]} channels, not 16 kHz mono")
        return whole

    def media(self, row: Row, kind: MediaKind) -> bytes:
        """The picture or the video of a clip, byte for byte as it was ingested; `row[kind]["suffix"]` is its form.

        LookupError if the clip has none (`row[kind]` is None), ValueError if the shard is damaged.
        """
        place = row.get(kind)
        if place is None:
            raise LookupError(f"clip {row['key']} has no {kind}")
        data = self._member(row, place["offset"], place["size"])
        if digest_bytes(data) != place["digest"]:
            raise self._damaged(row, f"its {kind} is not what the index says")
        return data

    def _member(self, row: Row, offset: int, length: int) -> bytes:
        name = row["shard"]
        url = join(self.root, name)
        if name in self._cached:
            shard = self._cached[name]
            with cached_copy(url, shard.sha256, shard.bytes) as copy:
                data = read_range(str(copy), offset, length)
        else:
            if name not in self.whole:
                if name in self._sha256 and digest_file(local_path(url)) != self._sha256[name]:
                    raise self._damaged(row, "its sha256 is not the manifest's")
                self.whole.add(name)
            data = read_range(url, offset, length)
        if len(data) != length:
            raise self._damaged(row, f"it ends before byte {offset + length}")
        return data

    @cached_property
    def _sha256(self) -> dict[str, str]:
        """By name of a local shard."""
        manifest = find_manifest(self.root) if is_local(self.root) else None
        return {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}

    @cached_property
    def _cached(self) -> dict[str, ShardInfo]:
        """Shards that are read from this machine's cache, by name: all of a store, or none."""
        manifest = find_manifest(self.root) if self.whole_shards else None
        shards = manifest.shards if manifest else ()
        return {shard.name: shard for shard in shards} if sum(shard.bytes for shard in shards) <= limit() else {}

    def _damaged(self, row: Row, fault: str) -> ValueError:
        return ValueError(f"clip {row['key']}: {join(self.root, row['shard'])} is damaged ({fault}): {REMEDY}")


def refuse_damaged(path: Path, shard: ShardInfo, root_url: str) -> None:
    """ValueError if the file at `path`, a shard or its copy in the shard cache, has not the manifest's sha256.

    A damaged copy is not taken again.
    """
    if digest_file(path) == shard.sha256:
        return
    url = join(root_url, shard.name)
    if is_local(url):
        raise ValueError(f"{url} is damaged (its sha256 is not the manifest's): {REMEDY}")
    distrust(path.resolve())
    raise ValueError(f"{path.resolve()} is no true copy of {shown(url)}: run the stage again, it is fetched anew")


def verify_shard(root_url: str, shard: ShardInfo) -> None:
    """Read a shard once and compare size, sha256, members and number of samples with the manifest.

    ValueError that names the shard and the fault; FileNotFoundError if it is missing.
    """
    url = join(root_url, shard.name)
    with open_read(url) as file:
        hashed = _Hashed(file)
        try:
            keys = {name.partition(".")[0] for name in member_names(cast(BinaryIO, hashed))}
            fault = "" if len(keys) == shard.samples else f"it holds {len(keys)} samples, not {shard.samples}"
        except (tarfile.TarError, ValueError, OverflowError) as error:
            fault = str(error)
        while hashed.read(BLOCK):
            pass
    if hashed.size != shard.bytes:
        fault = f"it has {hashed.size:,} bytes, not {shard.bytes:,}"
    elif hashed.sha256.hexdigest() != shard.sha256:
        fault = "its sha256 is not the manifest's"
    if fault:
        raise ValueError(f"{url} is damaged ({fault}): {REMEDY}")


def member_names(file: BinaryIO) -> Iterator[str]:
    """Names of the members of an uncompressed tar, read once from front to back.

    ValueError for anything but plain files with unique, relative names; tarfile.ReadError for a broken tar.
    """
    seen: set[str] = set()
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            name = member.name
            if not member.isreg() or member.issparse():
                raise ValueError(f"member {name!r} is not a plain file")
            if name.startswith("/") or ".." in name.split("/") or "\\" in name or not name.partition(".")[0]:
                raise ValueError(f"member {name!r} has a name that is not safe")
            if name in seen:
                raise ValueError(f"member {name!r} occurs twice")
            seen.add(name)
            yield name


class _Hashed:
    """A stream that notes the sha256 and the size of all that was read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, length: int) -> bytes:
        data = self.file.read(length)
        self.sha256.update(data)
        self.size += len(data)
        return data
