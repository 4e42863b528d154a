"""From a speaker, file, clip or data set to all that was made from it; from a model back to the files it has heard."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from components.registry.graph import Cache, Graph, Made, record_gaps
from components.registry.records import FeatureLink, Gap, Record
from components.registry.search import AudioPart, Subject, search
from components.schema import Strict
from infra.storage import join


class CachePart(Strict):
    """A feature cache; one that was removed is known by the records of the stages that used it."""

    place: str
    encoder: str
    kind: str
    digest: str
    url: str
    state: Literal["finished", "unfinished", "removed"]


class MadePart(Strict):
    """A stage or run; `clips` of the subject are in what it was trained on, 0 if it was only evaluated on them."""

    arch: str
    name: str
    url: str
    finished: bool
    clips: int


class ModelPart(Strict):
    """A registered version; the alias is the one that it was registered with last."""

    name: str
    version: str
    alias: str
    arch: str
    run: str
    clips: int


class Trace(Strict):
    """An answer; `gaps` is empty if everything has its origin."""

    kind: str
    name: str
    audio: tuple[AudioPart, ...] = ()
    caches: tuple[CachePart, ...] = ()
    codebooks: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()  # principal components
    stages: tuple[MadePart, ...] = ()
    runs: tuple[MadePart, ...] = ()
    models: tuple[ModelPart, ...] = ()
    weights: dict[str, str] = Field(default_factory=dict)  # pretrained, by reference: digest
    notes: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()


def forward(graph: Graph, subject: Subject, every: bool = False) -> Trace:
    """All that was made from the subject; `every` names all source files. A damaged index becomes a gap."""
    parts, notes, gaps = search(graph.audio, subject, every)
    trained = {part.digest: part.splits.get("train", 0) for part in parts if part.finished}
    places = {f"{part.dataset}/{part.version}" for part in parts}
    caches = [cache for cache in graph.caches if _made_of(cache, set(trained), places)]
    digests = {cache.record.digest for cache in caches if cache.record}
    named = {cache.record.codebook for cache in caches if cache.record}
    stages = _stages(graph, trained)
    runs = _runs(graph, trained, stages)
    affected = [run for run in graph.runs if run.url in runs]
    return Trace(
        kind=subject.kind,
        name=subject.name,
        audio=tuple(parts),
        caches=tuple(_cache_part(cache) for cache in caches),
        codebooks=tuple(name for name, made in graph.codebooks.items() if name in named or made.features in digests),
        projections=tuple(name for name, made in graph.projections.items() if made.audio in trained),
        stages=tuple(_made_part(stage, stages[stage.name]) for stage in graph.stages.values() if stage.name in stages),
        runs=tuple(_made_part(run, runs[run.url]) for run in affected),
        models=tuple(part for run in affected if (part := _model_part(run, runs[run.url]))),
        notes=tuple(notes),
        gaps=(*graph.gaps, *gaps),
    )


def backward(graph: Graph, name: str, url: str, record: Record, every: bool = False) -> Trace:
    """What a model was made from: `record` is its lineage, `url` its folder. Gaps are those on this way alone."""
    stages = [graph.stages[stage] for stage in record.stages if stage in graph.stages]
    records = [record, *(stage.record for stage in stages if stage.record)]
    links = {link.digest: link for one in records for link in one.data}
    features = {link.digest: link for one in records for link in one.features}
    codebooks = sorted({link.codebook for link in features.values() if link.codebook})
    under = {graph.codebooks[book].features for book in codebooks if book in graph.codebooks}
    there = {cache.record.digest: cache for cache in graph.caches if cache.record}
    wanted = dict.fromkeys((*features, *(digest for digest in under if digest in there)))
    gaps = list(record_gaps(graph, url, record))
    for stage in stages:
        gaps += record_gaps(graph, stage.url, stage.record)
        gaps += [] if stage.finished else [Gap(stage.url, "it has not finished, yet a model names it: train again")]
    gaps += [Gap(url, f"its codebook units/{b} is not in the lake") for b in codebooks if b not in graph.codebooks]
    places = {join(graph.lake, "audio", link.dataset, link.version) for link in links.values()}
    gaps += [gap for gap in graph.gaps if gap.url in places]  # there, but its manifest is damaged
    versions = [audio for audio in graph.audio if audio.manifest and audio.digest in links]
    parts, _, damaged = search(versions, Subject("dataset", ""), every)
    runs = [run for run in graph.runs if url.rstrip("/").startswith(run.url)]
    clips = sum(part.splits.get("train", 0) for part in parts)
    return Trace(
        kind="model",
        name=name,
        audio=tuple(parts),
        caches=tuple(_cache_part(there[d]) if d in there else _removed(graph, features[d]) for d in wanted),
        codebooks=tuple(codebooks),
        projections=tuple(sorted({link.projection for link in features.values() if link.projection})),
        stages=tuple(_made_part(stage, clips) for stage in stages),
        runs=tuple(_made_part(run, clips) for run in runs),
        models=tuple(part for run in runs if (part := _model_part(run, clips))),
        weights=record.weights,
        gaps=tuple(dict.fromkeys((*gaps, *damaged))),
    )


# ---- what came of it ------------------------------------------------------------------------------------------------


def _made_of(cache: Cache, digests: set[str], places: set[str]) -> bool:
    if cache.record is not None:
        return cache.record.audio_digest in digests
    return cache.place.partition("/")[2] in places


def _stages(graph: Graph, trained: dict[str, int]) -> dict[str, int]:
    """Stages that have the audio, or start from one that has → clips of the subject that went into their weights."""
    found: dict[str, int] = {}
    recorded = [(stage.name, stage.record) for stage in graph.stages.values() if stage.record]
    for name, record in sorted(recorded, key=lambda pair: len(pair[1].stages)):  # what a stage starts from comes first
        clips = [found[before] for before in record.stages if before in found]
        if data := {link.digest for link in record.data} & set(trained):
            clips.append(sum(trained[digest] for digest in data))
        if clips:
            found[name] = max(clips)
    return found


def _runs(graph: Graph, trained: dict[str, int], stages: dict[str, int]) -> dict[str, int]:
    """The same of runs, by URL; where a stage is missing, all of the audio counts."""
    found: dict[str, int] = {}
    for run in graph.runs:
        record = run.record or Record(data=())
        clips = [stages[name] for name in record.stages if name in stages]
        data = {link.digest for link in record.data} & set(trained)
        if data and not set(record.stages) <= set(graph.stages):
            clips.append(sum(trained[digest] for digest in data))
        if clips or data:
            found[run.url] = max(clips, default=0)
    return found


def _made_part(made: Made, clips: int) -> MadePart:
    return MadePart(arch=made.arch, name=made.name, url=made.url, finished=made.finished, clips=clips)


def _model_part(run: Made, clips: int) -> ModelPart | None:
    made = run.registered
    if made is None:
        return None
    return ModelPart(name=made.name, version=made.version, alias=made.alias, arch=run.arch, run=run.url, clips=clips)


def _cache_part(cache: Cache) -> CachePart:
    link = cache.record
    return CachePart(
        place=cache.place,
        encoder=link.encoder if link else "unknown",
        kind=link.kind if link else "unknown",
        digest=link.digest if link else "",
        url=cache.url,
        state="finished" if link else "unfinished",
    )


def _removed(graph: Graph, link: FeatureLink) -> CachePart:
    url = join(graph.lake, "features", link.place)
    return CachePart(
        place=link.place, encoder=link.encoder, kind=link.kind, digest=link.digest, url=url, state="removed"
    )
