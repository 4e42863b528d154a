"""Stage 1: audio and transcripts → WebDataset shards with an index, a manifest and a list of rejects."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow, task

from components.audio.vad import check_model
from components.datacard.card import write_card
from components.schema import AudioManifest, Reject, StageReport
from components.shards.group import in_turn, plan_groups, set_duplicates_aside
from components.shards.publish import publish, up_to_date
from infra import storage
from pipelines import artifacts, crew, retrying
from pipelines.config import RunConfig
from pipelines.jobs import run_stage
from pipelines.locate import Workspace
from pipelines.progress import Work, console
from pipelines.workers.ingest import careful_ingester, ingester
from pipelines.workspace import workspace

Group = tuple[int, list[Any]]


@flow(name="ingest", description="Audio and transcripts to WebDataset shards")
def ingest(config: RunConfig) -> StageReport:
    """Decode, check and pack every recording; an unchanged data set does nothing."""
    (report,) = run_stage("ingest", config, lambda: ingest_audio(workspace(config)))
    artifacts.show_stages([report], "ingest")
    return report


@task(name="ingest audio", **retrying.INGEST)
def ingest_audio(work: Workspace) -> StageReport:
    began = time.monotonic()
    root = work.audio_root
    done = up_to_date(root)
    if done is not None:
        return StageReport(
            stage="ingest",
            state="up to date",
            reused=len(done.shards),
            seconds=time.monotonic() - began,
            note=_note(done),
            url=root,
        )
    if work.config.ingest.cut == "speech":
        check_model()
    recordings, rejects = work.sources
    kept, doubled = set_duplicates_aside(recordings, work.config.data)
    groups = plan_groups(kept, work.config.per_shard)
    reused = _run(work, list(enumerate(groups)))
    aside: list[Reject] = [*rejects, *doubled]
    manifest = publish(
        root, work.dataset, work.version, groups, aside, work.config.data, work.config.per_shard, work.config.ingest
    )
    return StageReport(
        stage="ingest",
        state="resumed" if reused else "done",
        done=len(manifest.shards) - reused,
        reused=reused,
        seconds=time.monotonic() - began,
        note=_note(manifest),
        url=_card(root),
    )


def _note(manifest: AudioManifest) -> str:
    """What is there, and which steps set how many aside."""
    steps = ", ".join(f"{count} {step}" for step, count in manifest.asides.items())
    aside = f"{manifest.rejected} set aside" + (f" ({steps})" if steps else "")
    return f"{manifest.samples:,} clips, {manifest.seconds / 60:.1f} min, {aside}"


def _card(root: str) -> str:
    """URL of the data set's page; of the data set where the page cannot be made, which costs nobody the data."""
    try:
        return write_card(root)
    except (OSError, ValueError) as error:
        console.print(f"  no page for {root}: {error}")
        return root


def _run(work: Workspace, groups: list[Group]) -> int:
    """Make every shard; returns how many an earlier run had finished."""
    arguments = (work.audio_root, work.config.data, work.config.ingest)
    workers = 0 if work.config.ray_address else work.config.cores()
    ordered = [groups[i] for i in in_turn([group for _, group in groups], workers)]
    reused = 0
    with Work("ingest", len(groups), "shards") as progress:
        for number, (group, report) in enumerate(crew.over_shards(work.config, ingester, arguments, ordered), 1):
            reused += report.reused if not isinstance(report, crew.Crashed) else _find_culprits(work, group)
            progress.to(number)
    return reused


def _find_culprits(work: Workspace, group: Group) -> int:
    """A file takes the decoder's process down: note each file before it is decoded, set the last one aside, go on."""
    trying = storage.join(work.audio_root, "parts", f"trying-{group[0]}.txt")
    refused: dict[str, str] = {}
    for _ in group[1]:
        arguments = (work.audio_root, work.config.data, work.config.ingest, trying, refused)
        _, report = next(iter(crew.over_shards(work.config, careful_ingester, arguments, [group])))
        if not isinstance(report, crew.Crashed):
            break
        refused[storage.read_text(trying)] = (
            f"the decoder {report.reason} on this file; convert it to WAV or FLAC with another program"
        )
    storage.remove_tree(trying)
    return 0
