"""What lies in a lake and what came from what, read from manifests and lineage records alone.

    audio version ── feature cache ── codebook
          └───────────── training stage ── run ── registered version

Something that names no parent, or one that is not there, is a `Gap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from components.registry.records import (
    INPUTS,
    LINEAGE,
    REGISTERED,
    Codebook,
    FeatureLink,
    Gap,
    Projection,
    Record,
    Registration,
    read_part,
)
from components.schema import AudioManifest
from components.shards.index import MANIFEST, find_manifest
from components.shards.parts import PARTS
from infra.storage import exists, find, join, list_names

THREADS = 16  # small files that are asked for at once

B = TypeVar("B")


class Audio(NamedTuple):
    """A version of a data set; `manifest` is None while ingest has not finished."""

    url: str
    dataset: str
    version: str
    manifest: AudioManifest | None

    @property
    def digest(self) -> str:
        return self.manifest.digest if self.manifest else ""


class Cache(NamedTuple):
    """A feature cache at `<lake>/features/<place>`; `record` is None while it has not finished."""

    url: str
    place: str
    record: FeatureLink | None


class Made(NamedTuple):
    """A training stage or a run; `finished` of a run says whether it has a model."""

    url: str
    arch: str
    name: str
    finished: bool
    record: Record | None
    registered: Registration | None = None


@dataclass
class Graph:
    """All that lies in a lake."""

    lake: str
    audio: list[Audio]
    caches: list[Cache]
    codebooks: dict[str, Codebook]  # by digest
    projections: dict[str, Projection]  # by digest
    stages: dict[str, Made]  # by name
    runs: list[Made]
    gaps: list[Gap]


def read_graph(lake: str) -> Graph:
    """Every artefact of a lake. What cannot be read becomes a gap; no tar and no index is opened."""
    with ThreadPoolExecutor(THREADS) as pool:

        def read(made: Callable[[str, tuple[str, ...]], B | Gap | None], folder: str, depth: int) -> list[B | Gap]:
            root = join(lake, folder)
            places: list[tuple[str, ...]] = [()]
            for _ in range(depth):
                below = pool.map(lambda place: list_names(join(root, *place)), places)
                places = [(*place, name) for place, names in zip(places, below, strict=True) for name in names]
            return [one for one in pool.map(lambda p: made(join(root, *p), p), places) if one is not None]

        audio, caches = read(_audio, "audio", 2), read(_cache, "features", 3)
        codebooks, projections = read(_codebook, "units", 1), read(_projection, "projections", 1)
        stages, runs = read(_stage, "runs", 3), read(_run, "runs", 2)
    everything = [*audio, *caches, *codebooks, *projections, *stages, *runs]
    graph = Graph(
        lake,
        audio=[one for one in audio if isinstance(one, Audio)],
        caches=[one for one in caches if isinstance(one, Cache)],
        codebooks={one.digest: one for one in codebooks if isinstance(one, Codebook)},
        projections={one.digest: one for one in projections if isinstance(one, Projection)},
        stages={one.name: one for one in stages if isinstance(one, Made)},
        runs=[one for one in runs if isinstance(one, Made)],
        gaps=[one for one in everything if isinstance(one, Gap)],
    )
    _lend_records(graph)
    graph.gaps += _open_ends(graph)
    return graph


def record_gaps(graph: Graph, url: str, record: Record | None) -> Iterator[Gap]:
    """What a stage or run names and the lake does not have. A cache that was removed is none: its record names it."""
    if record is None or not record.data:
        yield Gap(url, f"no record of what it was made from ({INPUTS} or {LINEAGE}): run it again, or remove it")
        return
    there = {audio.digest for audio in graph.audio}
    for link in record.data:
        if link.digest not in there:
            yield Gap(url, _no_audio(link.dataset, link.version, link.digest))
    for name in record.stages:
        if name not in graph.stages:
            yield Gap(url, f"stage {name} is not in the lake: run the training again, or remove this")


def _no_audio(dataset: str, version: str, digest: str = "") -> str:
    known = f" (digest {digest[:12]})" if digest else ""
    return (
        f"audio {dataset}/{version}{known} is not in the lake, or not legible: ingest that data again, or remove this"
    )


def _audio(url: str, place: tuple[str, ...]) -> Audio | Gap | None:
    try:
        manifest = find_manifest(url)
    except ValueError as error:
        return Gap(url, f"cannot be read: {' '.join(str(error).split())[:200]}")
    if manifest is None and not list_names(join(url, PARTS)):
        return None
    return Audio(url, place[0], place[1], manifest)


def _cache(url: str, place: tuple[str, ...]) -> Cache | Gap | None:
    record = read_part(join(url, MANIFEST), FeatureLink, has_seal=True)
    if isinstance(record, Gap):
        return record
    return Cache(url, "/".join(place), record) if record or find(url) else None


def _codebook(url: str, place: tuple[str, ...]) -> Codebook | Gap | None:
    return read_part(join(url, MANIFEST), Codebook, has_seal=True)


def _projection(url: str, place: tuple[str, ...]) -> Projection | Gap | None:
    return read_part(join(url, "projection.json"), Projection, has_seal=True)


def _stage(url: str, place: tuple[str, ...]) -> Made | Gap | None:
    if place[1] != "stages":
        return None
    record = read_part(join(url, INPUTS), Record)
    if isinstance(record, Gap):
        return record
    if record is None and not find(url):  # an empty folder
        return None
    return Made(url, place[0], place[2], exists(join(url, MANIFEST)), record)


def _run(url: str, place: tuple[str, ...]) -> Made | Gap | None:
    if place[1] == "stages":
        return None
    lineage = read_part(join(url, LINEAGE), Record)
    registered = read_part(join(url, REGISTERED), Registration)
    if registered is not None and lineage is None:
        return Gap(url, f"registered, but {LINEAGE} is missing: register it again, or remove it from the registry")
    record = lineage or read_part(join(url, INPUTS), Record)
    if isinstance(record, Gap):
        return record
    if isinstance(registered, Gap):
        return registered
    if record is None and not find(url):
        return None
    return Made(url, place[0], place[1], lineage is not None, record, registered)


def _lend_records(graph: Graph) -> None:
    """A stage of before `inputs.json` was written has the record of the run that names it."""
    for run in graph.runs:
        for number, name in enumerate(run.record.stages if run.record else ()):
            stage = graph.stages.get(name)
            if stage is not None and stage.record is None and run.record is not None:
                lent = run.record.model_copy(update={"stages": run.record.stages[:number]})
                graph.stages[name] = stage._replace(record=lent)


def _open_ends(graph: Graph) -> Iterator[Gap]:
    audio = {version.digest for version in graph.audio}
    places = {f"{version.dataset}/{version.version}" for version in graph.audio}
    records = [cache.record for cache in graph.caches if cache.record]
    digests, coded = {record.digest for record in records}, {record.codebook for record in records}
    for cache in graph.caches:
        dataset, _, version = cache.place.partition("/")[2].partition("/")
        if cache.record is None and f"{dataset}/{version}" not in places:
            yield Gap(cache.url, _no_audio(dataset, version))
        if cache.record is not None and cache.record.audio_digest not in audio:
            yield Gap(cache.url, _no_audio(dataset, version, cache.record.audio_digest))
        if cache.record is not None and cache.record.codebook not in (None, *graph.codebooks):
            yield Gap(cache.url, f"its codebook units/{cache.record.codebook} is not in the lake: run the cache stage")
    for name, codebook in graph.codebooks.items():
        if codebook.features not in digests and name not in coded:
            yield Gap(join(graph.lake, "units", name), "the cache that it was fitted on is not in the lake: remove it")
    for name, projection in graph.projections.items():
        if projection.audio not in audio:
            lacks = f"the audio that it was fitted on (digest {projection.audio[:12]}) is not in the lake: remove it"
            yield Gap(join(graph.lake, "projections", name), lacks)
    for made in (*graph.stages.values(), *graph.runs):
        yield from record_gaps(graph, made.url, made.record)
