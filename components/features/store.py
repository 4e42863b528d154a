"""A finished feature cache: published once from its parts, then read clip by clip, locally or over the network."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from components.digest import digest, digest_bytes
from components.features.compact import unpack
from components.features.form import BF16, form_of
from components.features.index import Place, Places, index_bytes, parse_index
from components.features.key import fingerprint
from components.features.mapped import Bytes, check_member, map_file, tensor_before, tensors_before
from components.features.parts import check_parts, finished_part, remedy
from components.features.projection import copied_projection, copy_projection, load_projection
from components.schema import AudioManifest, FeatureManifest
from components.seal import read_sealed, sealed, unsealed
from components.shards.tar import BLOCK, is_framed
from infra.storage import (
    exists,
    is_local,
    join,
    local_path,
    open_read,
    publish_bytes,
    read_bytes,
    read_range,
    size,
    write_bytes,
)

MANIFEST = "manifest.json"
INDEX = "features.parquet"
PROJECTION = "projection"  # folder of the principal components, in a cache whose form needs them
THREADS = 16  # small files that are asked for at once
BUFFER = 8 << 20  # bytes
NOTHING: Bytes = np.empty(0, np.uint8)

REMEDY = "remove {root}/" + MANIFEST + " and run the cache stage again, finished shards are kept"


class FeatureStore:
    """Reads a finished cache at `root_url`: from memory maps where it is local, by ranges where it is remote.

    Shards are immutable: they are published whole and never written again. So a local shard is mapped once, when its
    first clip is read, and a clip is checked once, the first time that this process reads it. After a damaged shard
    was made anew the store is opened again.

    It holds no open file and no lock. Threads may share it: what they could do twice (to map a shard, to check a clip)
    has the same result. A forked process goes on with the maps of its parent; pickled, the store is its URL.

    FileNotFoundError if the cache is not finished, ValueError if its index or its principal components are damaged.
    """

    def __init__(self, root_url: str) -> None:
        self.root = root_url
        manifest = published(root_url)
        if manifest is None:
            raise FileNotFoundError(f"no finished feature cache at {root_url}: run the cache stage, it resumes")
        self.manifest = manifest
        self.places = read_places(root_url, manifest.index_sha256)
        self.form = form_of(manifest.key)
        self.projection = None
        if self.form.dims:
            named = manifest.key["form"]["projection"]
            self.projection = copied_projection(join(root_url, PROJECTION), named, manifest.width)
        self.plain = self.form == BF16 or manifest.kind == "units"  # what is stored is what is given
        self.local = is_local(root_url)
        self.maps: dict[str, Bytes] = {}  # by name of the shard
        self.bytes = {shard.name: shard.bytes for shard in manifest.shards}
        self.checked = bytearray(len(self.places))  # 1 for each clip that is known to be whole

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[str]]:
        return type(self), (self.root,)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def keys(self) -> list[str]:
        """Keys in the order in which they are stored."""
        return list(self.places)

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """The keys sorted by shard and offset, so that reading them is sequential."""
        return sorted(keys, key=lambda key: self.place(key)[:2])

    def place(self, key: str) -> Place:
        """Where a clip lies; KeyError that names the cache if it has none."""
        return self.places.at(self._row(key))

    def frames(self, key: str) -> int:
        """Frames of a clip, from the index."""
        return self.place(key).frames

    def load(self, key: str) -> Tensor:
        """Features `(frames, width)` bfloat16 of a clip, or its units `(frames,)` int32.

        From a local cache of plain bfloat16 or of units it is a view of the shard, which no copy is made of and which
        may outlive the store: clone it before you write into it. Other forms are computed from what is stored.
        FileNotFoundError if the shard is missing, ValueError if the clip is damaged.
        """
        row = self._row(key)
        place = self.places.at(row)
        if not self.local:
            data = read_range(join(self.root, place.shard), place.offset, place.size)
            member = np.frombuffer(bytearray(data), np.uint8)  # a copy that may be written into, as torch wants it
            self._check(key, place, member)
            return self._given(member, place.size, place)
        if not self.checked[row]:
            self._check_mapped(key, place, row)
            self.checked[row] = 1
        return self._given(self._map(place.shard), place.offset + place.size, place)

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's; ValueError that names those that differ."""
        shards = self.manifest.shards
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda shard: _sha256(join(self.root, shard.name)), shards))
        damaged = [shard.name for shard, sha in zip(shards, found, strict=True) if sha != shard.sha256]
        if damaged:
            raise ValueError(
                f"{len(damaged)} of {len(shards)} shards in {self.root} are damaged or "
                f"missing ({', '.join(damaged[:5])}): {remedy(self.root, damaged[0])}"
            )

    def _row(self, key: str) -> int:
        try:
            return self.places.rows[key]
        except KeyError:
            raise KeyError(f"clip {key!r} is not in the feature cache {self.root}") from None

    def _given(self, memory: Bytes, end: int, place: Place) -> Tensor:
        """What `load` gives of the tensors that end at byte `end`."""
        shapes = self._shapes(place)
        if self.plain:
            return tensor_before(memory, end, self.manifest.kind, shapes[self.manifest.kind])
        return unpack(tensors_before(memory, end, shapes), place.frames, self.form, self.projection)

    def _shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        if self.manifest.kind == "units":
            return {"units": (place.frames,)}
        return self.form.shapes(place.frames, self.manifest.width)

    def _map(self, name: str) -> Bytes:
        """The bytes of a local shard; of two threads that map it at once the first one's map stays."""
        shard = self.maps.get(name)
        return self.maps.setdefault(name, map_file(local_path(join(self.root, name)))) if shard is None else shard

    def _check_mapped(self, key: str, place: Place, row: int) -> None:
        """`_check` of a clip in a local shard, and of the tar around it, so that no bit of a shard stays unseen."""
        url, end = join(self.root, place.shard), place.offset + place.size
        last = row + 1 == len(self) or self.places.codes[row + 1] != self.places.codes[row]
        behind = self.bytes[place.shard] if last else end + -end % BLOCK
        try:
            whole = size(url) >= behind  # to touch a map behind the end of its file would kill the process
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url} is missing: run the cache stage again, it makes only this shard") from error
        shard = self._map(place.shard) if whole else NOTHING
        self._check(key, place, shard[place.offset : end])
        if not is_framed(shard, f"{key}.safetensors", place.offset, place.size, behind):
            raise ValueError(f"the tar around clip {key!r} in {url} is damaged: {remedy(self.root, place.shard)}")

    def _check(self, key: str, place: Place, member: Bytes) -> None:
        """ValueError if the safetensors bytes of a clip are not those that were published, or not what they claim."""
        url = join(self.root, place.shard)
        if len(member) != place.size or zlib.crc32(member.data) != place.crc32:
            raise ValueError(f"clip {key!r} in {url} is damaged: {remedy(self.root, place.shard)}")
        try:
            check_member(member, self._shapes(place))
        except ValueError as error:
            raise ValueError(
                f"clip {key!r} in {url} does not fit the index ({error}): {remedy(self.root, place.shard)}"
            ) from error


def publish_features(
    feature_root: str, key: dict[str, Any], audio: AudioManifest, projection_url: str | None = None
) -> FeatureManifest:
    """Collate the parts of a cache into `features.parquet` and, last and once, `manifest.json`.

    The principal components at `projection_url`, if the key's form has some, are copied into the cache.
    Returns the manifest that is there if the cache was published before. ValueError if shards are missing, or the parts
    were not all made with the numerics that the key names, or another manifest stands at that place.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda shard: finished_part(shard, feature_root), audio.shards))
    missing = [shard.name for shard, part in zip(audio.shards, found, strict=True) if part is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} shards of {feature_root} are not there yet "
            f"({', '.join(missing[:5])}): run the cache stage again, it resumes"
        )
    parts = [part for part in found if part is not None]
    check_parts(feature_root, key, parts)
    places = Places.of(
        (row.key, Place(part.shard.name, row.offset, row.size, row.frames, row.crc32))
        for part in parts
        for row in part.rows
    )
    manifest = FeatureManifest(
        kind=key["kind"],
        fingerprint=fingerprint(key),
        key=key,
        dataset=audio.dataset,
        version=audio.version,
        audio_digest=audio.digest,
        digest="",
        shards=tuple(part.shard for part in parts),
        samples=len(places),
        frames=sum(part.frames for part in parts),
        width=parts[0].width if parts else 0,
    )
    index = index_bytes(places)
    named = {"digest": content_digest(manifest, places), "index_sha256": digest_bytes(index)}
    data = sealed(manifest.model_copy(update=named), indent=2)
    manifest = unsealed(data, FeatureManifest, MANIFEST)
    before = published(feature_root)
    if before is not None and before.digest != manifest.digest:
        raise ValueError(f"{feature_root} was published from other shards: remove that folder and run the stage again")
    if projection_url is not None:
        copy_projection(projection_url, join(feature_root, PROJECTION))
    write_bytes(join(feature_root, INDEX), index)  # also when it was lost after the manifest was written
    # Another release of pyarrow may write the same index in other bytes: then the manifest follows it.
    (publish_bytes if before is None else write_bytes)(join(feature_root, MANIFEST), data)
    return manifest


def published(feature_root: str) -> FeatureManifest | None:
    """The manifest of a finished cache, or None; ValueError if it is damaged or has no seal."""
    url = join(feature_root, MANIFEST)
    if not exists(url):
        return None
    try:
        return read_sealed(url, FeatureManifest)
    except ValueError as error:
        raise ValueError(f"{error}: {REMEDY.format(root=feature_root)}") from error


def up_to_date(feature_root: str, audio: AudioManifest) -> FeatureManifest | None:
    """The manifest if the cache was made from exactly this audio and every file has its size, else None."""
    manifest = published(feature_root)
    if manifest is None or manifest.audio_digest != audio.digest or not exists(join(feature_root, INDEX)):
        return None

    def whole(name: str, expected: int) -> bool:
        return exists(join(feature_root, name)) and size(join(feature_root, name)) == expected

    if form_of(manifest.key).dims:
        try:
            load_projection(join(feature_root, PROJECTION))
        except ValueError:
            return None
    with ThreadPoolExecutor(THREADS) as pool:
        complete = all(pool.map(lambda shard: whole(shard.name, shard.bytes), manifest.shards))
    return manifest if complete else None


def content_digest(manifest: FeatureManifest, places: Places) -> str:
    """Digest of a cache: all that its manifest says of it and what its index holds, in whichever bytes."""
    said = manifest.model_dump(mode="json", exclude={"digest", "index_sha256", "seal"})
    return digest(said | {"index": places.sha256()})


def read_places(feature_root: str, sha256: str) -> Places:
    """The index of a cache. ValueError if it cannot be read, or its bytes have another sha256."""
    url = join(feature_root, INDEX)
    try:
        data = read_bytes(url)
        if digest_bytes(data) != sha256:
            raise ValueError("its sha256 is not the manifest's")
        return parse_index(data)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{url} cannot be read ({error}): {REMEDY.format(root=feature_root)}") from error


def _sha256(url: str) -> str:
    """sha256 of a file at any URL; empty if it is not there."""
    if not exists(url):
        return ""
    total = hashlib.sha256()
    with open_read(url) as file:
        while block := file.read(BUFFER):
            total.update(block)
    return total.hexdigest()
