"""Stage 2: what the frozen encoders make of every clip, computed once; for discrete systems also units."""

from __future__ import annotations

import time

from prefect import flow, task

from components.features.cost import account, estimate
from components.features.form import BF16, form_of, refuse_pool
from components.features.key import feature_key
from components.features.store import FeatureStore, publish_features, up_to_date
from components.schema import FeatureManifest, StageReport
from components.shards.index import read_index
from infra import storage
from pipelines import artifacts, crew, retrying
from pipelines.config import RunConfig
from pipelines.jobs import run_stage
from pipelines.locate import Workspace
from pipelines.progress import Work, console
from pipelines.workers.cache import extractor
from pipelines.workspace import workspace


@flow(name="cache", description="Encoder features of every clip, and units for discrete systems")
def cache(config: RunConfig) -> list[StageReport]:
    """Encode what is not encoded yet. A cache is shared by every architecture with the same encoder.

    Nothing is cached where the first stage already trains an encoder: features would change with every step.
    """
    reports = run_stage("cache", config, lambda: _cache(workspace(config)))
    artifacts.show_stages(reports, "cache")
    return reports


def _cache(work: Workspace) -> list[StageReport]:
    if not work.cached:
        note = "not needed: the encoder is trained, so the stages hear the audio itself"
        return [StageReport(stage="cache", state="up to date", note=note)]
    reports = [fit_components(work)] if any(form.dims for form in work.forms.values()) else []
    reports.append(cache_features(work))
    if work.preset.units is not None:
        reports += [fit_codebook(work), cache_units(work)]
    return reports


@task(name="fit principal components", **retrying.CACHE)
def fit_components(work: Workspace) -> StageReport:
    """Of the frames of the train split, for each encoder: what a form such as pca-256-int8 is made with."""
    began = time.monotonic()
    before = storage.list_names(storage.join(work.config.lake, "projections"))
    made = work.projections
    there = sum(name in before for _, name in made.values())
    return StageReport(
        stage="components",
        state="up to date" if there == len(made) else "done",
        unit="encoders",
        done=len(made) - there,
        reused=there,
        seconds=time.monotonic() - began,
        note=", ".join(f"{role} {name}" for role, (_, name) in made.items()),
        url=next(url for url, _ in made.values()),
    )


@task(name="cache features", **retrying.CACHE)
def cache_features(work: Workspace) -> StageReport:
    """The frames of every clip, in the form that the run asks for."""
    for role in work.feature_roots:
        refuse_pool(work.forms[role], work.architecture.mean_pool(work.preset), work.architecture.connector_name)
    return _fill(work, "cache", work.feature_roots, None)


@task(name="fit units", **retrying.CACHE)
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


@task(name="cache units", **retrying.CACHE)
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
            note=_note(there, roots),
            url=next(iter(roots.values())),
        )
    sources = dict(zip(roots, work.encoders, strict=False)) if codebook else {role: role for role in roots}
    index = read_index(work.audio_root)
    for role, root in roots.items():
        form = BF16 if codebook else work.forms[role]
        cost = estimate(index, work.encoders[sources[role]], root, units=codebook is not None, form=form)
        console.print(f"  {role}: {cost}")
    missing = {sources[role]: root for role, root in roots.items() if there[role] is None}
    reused = _extract(work, missing, codebook)
    for role, root in roots.items():
        if there[role] is None:
            url = None if codebook else work.projections.get(role, (None, None))[0]
            key = feature_key(work.encoders[sources[role]], codebook[1]) if codebook else work.key_of(role)
            there[role] = publish_features(root, key, audio, url)
    reused += len(audio.shards) * (len(roots) - len(missing))
    return StageReport(
        stage=name,
        state="resumed" if reused else "done",
        done=shards - reused,
        reused=reused,
        seconds=time.monotonic() - began,
        note=_note(there, roots),
        url=next(iter(roots.values())),
    )


def _extract(work: Workspace, roots: dict[str, str], codebook: tuple[str, str] | None) -> int:
    """Fill the caches; returns how many parts an earlier run had finished."""
    preset = work.preset.model_dump(mode="json")
    keys = {role: feature_key(work.encoders[role]) for role in roots}
    forms = {} if codebook else {role: str(work.forms[role]) for role in roots}
    urls = {} if codebook else {role: url for role, (url, _) in work.projections.items() if role in roots}
    arguments = (preset, work.audio_root, roots, keys, codebook[0] if codebook else None, forms, urls)
    on_cards = any(key["numerics"]["device"] == "cuda" for key in keys.values())
    longest_first = sorted(work.audio.shards, key=lambda shard: -shard.seconds)  # as ingest does
    reused = 0
    with Work("cache", len(longest_first), "shards") as progress:
        for number, (shard, parts) in enumerate(
            crew.over_shards(work.config, extractor, arguments, longest_first, on_cards), 1
        ):
            if isinstance(parts, crew.Crashed):
                raise RuntimeError(
                    f"the encoder {parts.reason} on {shard.name} of {work.audio_root}: is there enough memory?"
                )
            reused += sum(part.reused for part in parts)
            progress.to(number)
    return reused


def _note(there: dict[str, FeatureManifest | None], roots: dict[str, str]) -> str:
    """Of each role what is stored: frames and width or, unless that is plain bfloat16, the form and its bytes."""
    notes = []
    for role, manifest in there.items():
        if manifest is not None and form_of(manifest.key) == BF16:
            notes.append(f"{role} {manifest.frames:,} frames x {manifest.width}")
        elif manifest is not None:
            stored = f"{form_of(manifest.key)}: {account(FeatureStore(roots[role]))}"
            notes.append(f"{role} {manifest.width} wide as {stored}")
    return ", ".join(notes)
