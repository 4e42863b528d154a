"""Which feature caches a lake has, which of them nothing leads to any more, and how they are removed.

Removing begins with a mark and the manifest, so that a cache that is half removed is never read as a finished one, and
the next call knows that it is to go on. What leads to a cache is told by the caller, by place and by digest, so that a
damaged manifest does not make a cache look unused.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from components.schema import FeatureManifest, Strict
from components.seal import read_sealed
from infra.listing import files_below
from infra.storage import join, remove_tree, write_json

MANIFEST = "manifest.json"
MARK = "evicting.json"  # in a cache that is being removed
FOLDER = "features"
IN_USE = 3600.0  # seconds since the last change within which a cache counts as being made
THREADS = 16  # small files that are asked for, or files that are removed, at once


class Cache(Strict):
    """A feature cache at `<lake>/features/<place>`; digest, frames and width are empty or 0 until it has finished."""

    url: str
    place: str  # <fingerprint>/<dataset>/<version>
    dataset: str
    version: str
    encoder: str
    kind: str
    digest: str
    clips: int
    frames: int
    width: int
    bytes: int  # of all its files
    modified: float  # seconds since 1970 of its newest file
    finished: bool
    removing: bool  # an earlier call was killed while it removed it
    audio: bool  # the audio version that it was made from is in the lake
    used_by: tuple[str, ...]  # stages and runs whose records name it

    @property
    def reachable(self) -> bool:
        return self.audio or bool(self.used_by)


class Policy(Strict):
    """What is to go. Each limit narrows the choice; `larger_than` takes of what is left until the lake is under it."""

    older_than: float | None = None  # seconds since the last change
    larger_than: int | None = None  # bytes that all caches together may have
    unreachable: bool = False  # only caches whose audio version is gone
    even_reachable: bool = False  # also those that stages or runs name, and those changed within the last hour


class Choice(NamedTuple):
    """What goes, in order, and what would go if it were not kept, with the reason."""

    going: list[Cache]
    kept: list[tuple[Cache, str]]
    left: int  # bytes of the caches that stay


def list_caches(lake: str, audio: Mapping[str, str], users: Mapping[str, Sequence[str]]) -> list[Cache]:
    """Every feature cache of a lake, by place.

    `audio` maps `<dataset>/<version>` of the audio in the lake to its digest, empty while it is not known;
    `users` maps digests and places of caches to the names of the stages and runs whose records name them.
    """
    root = join(lake, FOLDER)
    caches: dict[str, dict[str, tuple[int, float]]] = {}
    for name, size, modified in files_below(root):
        parts = name.split("/")
        if len(parts) > 3:  # <fingerprint>/<dataset>/<version>/<file>
            caches.setdefault("/".join(parts[:3]), {})["/".join(parts[3:])] = (size, modified)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda one: _cache(root, one[0], one[1], audio, users), sorted(caches.items())))


def choose(caches: Iterable[Cache], policy: Policy, now: float | None = None) -> Choice:
    """What is to be removed: unreachable caches first, then those that no stage or run names, each oldest first.

    ValueError if the policy has no limit.
    """
    if policy.older_than is None and policy.larger_than is None and not policy.unreachable:
        raise ValueError("say what is to go: --older-than 30d, --larger-than 10GB or --unreachable")
    now = time.time() if now is None else now
    ordered = sorted(
        caches, key=lambda one: (not one.removing, bool(one.used_by), one.reachable, one.modified, one.place)
    )
    left = sum(one.bytes for one in ordered)
    going: list[Cache] = []
    kept: list[tuple[Cache, str]] = []
    for one in ordered:
        if not one.removing:
            if policy.unreachable and one.audio:
                continue
            if policy.older_than is not None and now - one.modified <= policy.older_than:
                continue
            if policy.larger_than is not None and left <= policy.larger_than:
                continue
            reason = "" if policy.even_reachable else _protected(one, now)
            if reason:
                kept.append((one, reason))
                continue
        going.append(one)
        left -= one.bytes
    return Choice(going, kept, left)


def remove(cache: Cache) -> None:
    """Remove a cache: its manifest first, then the rest. Killed midway, the next `choose` takes it first."""
    write_json(join(cache.url, MARK), {"removing": cache.place})
    remove_tree(join(cache.url, MANIFEST))
    names = [name for name, _, _ in files_below(cache.url) if name != MARK]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: remove_tree(join(cache.url, name)), names))
    remove_tree(cache.url)


def _protected(cache: Cache, now: float) -> str:
    if cache.used_by:
        return f"used by {len(cache.used_by)} stages and runs"
    return "changed within the last hour" if now - cache.modified < IN_USE else ""


def _cache(
    root: str,
    place: str,
    files: Mapping[str, tuple[int, float]],
    audio: Mapping[str, str],
    users: Mapping[str, Sequence[str]],
) -> Cache:
    url = join(root, place)
    manifest = _manifest(join(url, MANIFEST)) if MANIFEST in files else None
    data = place.partition("/")[2]
    dataset, _, version = data.partition("/")
    newest = max((modified for name, (_, modified) in files.items() if name != MARK), default=0.0)
    known = data in audio if manifest is None else _there(manifest, data, audio)
    used = {*users.get(place, ()), *(users.get(manifest.digest, ()) if manifest else ())}
    return Cache(
        url=url,
        place=place,
        dataset=dataset,
        version=version,
        encoder=_encoder(manifest.key) if manifest else "unknown",
        kind=manifest.kind if manifest else "unknown",
        digest=manifest.digest if manifest else "",
        clips=manifest.samples if manifest else 0,
        frames=manifest.frames if manifest else 0,
        width=manifest.width if manifest else 0,
        bytes=sum(size for size, _ in files.values()),
        modified=newest,
        finished=manifest is not None,
        removing=MANIFEST not in files and MARK in files and newest <= files[MARK][1],
        audio=known,
        used_by=tuple(sorted(used)),
    )


def _there(manifest: FeatureManifest, data: str, audio: Mapping[str, str]) -> bool:
    return audio.get(data) == "" or manifest.audio_digest in audio.values()


def _manifest(url: str) -> FeatureManifest | None:
    """None if it cannot be read, too: then the cache counts as unfinished, as for the cache stage."""
    with suppress(FileNotFoundError, ValueError):
        return read_sealed(url, FeatureManifest)
    return None


def _encoder(key: Mapping[str, Any]) -> str:
    """Name of the encoder, and the form that its features are kept in unless that is plain bfloat16."""
    spec, form = key.get("encoder"), key.get("form")
    name = str(spec.get("kind", "unknown")) if isinstance(spec, dict) else str(spec or "unknown")
    return f"{name}, {form.get('name')}" if isinstance(form, dict) else name
