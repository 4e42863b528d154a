"""Stage 2: what the frozen encoders make of every clip, computed once; for discrete systems also units."""

from __future__ import annotations

import time

from prefect import flow, task

from components.features.cost import estimate
from components.features.key import feature_key
from components.features.store import publish_features, up_to_date
from components.schema import FeatureManifest, StageReport
from components.shards.index import read_index
from infra import storage
from pipelines import remote
from pipelines.config import RunConfig
from pipelines.locate import Workspace
from pipelines.progress import Work, console
from pipelines.workers.cache import extractor
from pipelines.workspace import workspace


@flow(name="cache", description="Encoder features of every clip, and units for discrete systems")
def cache(config: RunConfig) -> list[StageReport]:
    """Encode what is not encoded yet. A cache is shared by every architecture with the same encoder.

    Nothing is cached where the first stage already trains an encoder: features would change with every step.
    """
    work = workspace(config)
    if not work.cached:
        note = "not needed: the encoder is trained, so the stages hear the audio itself"
        return [StageReport(stage="cache", state="up to date", note=note)]
    reports = [cache_features(work)]
    if work.preset.units is not None:
        reports += [fit_codebook(work), cache_units(work)]
    return reports


@task(name="cache features")
def cache_features(work: Workspace) -> StageReport:
    return _fill(work, "cache", work.feature_roots, None)


@task(name="fit units")
def fit_codebook(work: Workspace) -> StageReport:
    """k-means over the encoder frames of the train split: the speech tokenizer of a discrete system."""
    began = time.monotonic()
    before = storage.list_names(storage.join(work.config.lake, "units"))
    made = work.codebook
    assert made is not None
    there = made[1] in before
    return StageReport(
        stage="units",
        state="up to date" if there else "done",
        unit="codebook",
        done=int(not there),
        reused=int(there),
        seconds=time.monotonic() - began,
        url=made[0],
        note=f"{work.preset.units} clusters, {made[1]}",
    )


@task(name="cache units")
def cache_units(work: Workspace) -> StageReport:
    assert work.codebook is not None
    return _fill(work, "cache units", work.model_inputs, work.codebook)


def _fill(work: Workspace, name: str, roots: dict[str, str], codebook: tuple[str, str] | None) -> StageReport:
    began = time.monotonic()
    audio = work.audio
    there = {role: up_to_date(root, audio) for role, root in roots.items()}
    shards = len(audio.shards) * len(roots)
    if all(there.values()):
        return StageReport(
            stage=name,
            state="up to date",
            reused=shards,
            seconds=time.monotonic() - began,
            note=_note(there),
            url=next(iter(roots.values())),
        )
    sources = dict(zip(roots, work.encoders, strict=False)) if codebook else {role: role for role in roots}
    index = read_index(work.audio_root)
    for role, root in roots.items():
        console.print(f"  {role}: {estimate(index, work.encoders[sources[role]], root, units=codebook is not None)}")
    missing = {sources[role]: root for role, root in roots.items() if there[role] is None}
    reused = _extract(work, missing, codebook)
    for role, root in roots.items():
        key = feature_key(work.encoders[sources[role]], codebook[1] if codebook else None)
        there[role] = there[role] or publish_features(root, key, audio)
    reused += len(audio.shards) * (len(roots) - len(missing))
    return StageReport(
        stage=name,
        state="resumed" if reused else "done",
        done=shards - reused,
        reused=reused,
        seconds=time.monotonic() - began,
        note=_note(there),
        url=next(iter(roots.values())),
    )


def _extract(work: Workspace, roots: dict[str, str], codebook: tuple[str, str] | None) -> int:
    """Fill the caches; returns how many parts an earlier run had finished."""
    preset = work.preset.model_dump(mode="json")
    keys = {role: feature_key(work.encoders[role]) for role in roots}
    arguments = (preset, work.audio_root, roots, keys, codebook[0] if codebook else None)
    reused = 0
    with Work("cache", len(work.audio.shards), "shards") as progress:
        for number, (shard, parts) in enumerate(
            remote.over_shards(work.config, extractor, arguments, work.audio.shards), 1
        ):
            if isinstance(parts, remote.Crashed):
                raise RuntimeError(
                    f"the encoder {parts.reason} on {shard.name} of {work.audio_root}: is there enough memory?"
                )
            reused += sum(part.reused for part in parts)
            progress.to(number)
    return reused


def _note(there: dict[str, FeatureManifest | None]) -> str:
    return ", ".join(f"{role} {m.frames:,} frames x {m.width}" for role, m in there.items() if m is not None)
