"""Stage 5: the whole model as a folder with card, recipe and lineage, a version in the registry, and the report."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, task

from components.digest import digest, digest_file
from components.evaluation.examples import Example, choose
from components.evaluation.metrics import Scores, flat, main_metric
from components.evaluation.report import ReportData, write_report
from components.features.units import load_codebook
from components.registry.card import CardData, model_card
from components.registry.evaluation_record import EVALUATION, evaluation_record
from components.registry.lineage import lineage
from components.registry.mlflow_registry import register as register_version
from components.registry.names import refuse_champion
from components.registry.records import Link
from components.schema import StageReport
from components.shards.index import read_rows
from components.shards.reader import ShardReader
from components.training.history import read_metrics
from components.training.weights import load_weights
from infra import storage
from infra.secrets import redacted
from models.contract import SpeechLLM
from models.pretrained import folder_digest, load_tokenizer, resolve
from pipelines import artifacts, retrying
from pipelines.config import RunConfig
from pipelines.evaluate import read_hypotheses, read_scores
from pipelines.jobs import run_stage
from pipelines.locate import Workspace
from pipelines.workspace import workspace

REGISTERED, REPORT = "registered.json", "report.html"
EXAMPLES = 8


@flow(name="register", description="A model folder, a registry version and a report")
def register(config: RunConfig) -> StageReport:
    """Assemble, publish and register the trained model. The same content again gives the version that is there."""
    (report,) = run_stage("register", config, lambda: register_model(workspace(config)))
    work = workspace(config)
    artifacts.show_model(work, storage.read_json(storage.join(work.run_root, REGISTERED)))
    return report


@task(name="register model", **retrying.REGISTER)
def register_model(work: Workspace) -> StageReport:
    began = time.monotonic()
    refuse_champion(work.config.alias)
    record = storage.join(work.run_root, REGISTERED)
    wanted = {"name": work.model_name, "alias": work.config.alias, "tracking_uri": redacted(work.tracking_uri)}
    old = storage.read_json(record) if storage.exists(record) else {}
    if wanted.items() <= old.items():
        return StageReport(
            stage="register",
            state="up to date",
            reused=1,
            unit="version",
            seconds=time.monotonic() - began,
            note=_note(old),
            url=old["folder"],
        )
    scores, _ = read_scores(work)
    folder = storage.join(work.run_root, "model")
    manifest = storage.join(folder, "manifest.json")
    if not storage.exists(manifest):
        storage.write_json(manifest, _assemble(work, folder))
    made = register_version(
        folder,
        work.model_name,
        flat(scores),
        {"architecture": work.config.arch, "preset": work.config.preset, "run": work.run_root}
        | _measured(work, scores),
        work.config.alias,
        work.tracking_uri,
        params={"data": work.config.data, "preset": work.config.preset},
        history=_history(work),
        folder_digest=digest(storage.read_json(manifest)),
    )
    written = wanted | {"version": made.version, "uri": made.uri, "folder": folder}
    storage.write_json(record, written)
    return StageReport(
        stage="register",
        state="done",
        done=1,
        unit="version",
        seconds=time.monotonic() - began,
        note=_note(written),
        url=folder,
    )


def write_run_report(work: Workspace, reports: list[StageReport]) -> str:
    """The page of a run; returns its URL. What is there is kept if nothing was done anew."""
    url = storage.join(work.run_root, REPORT)
    if storage.exists(url) and all(report.state == "up to date" for report in reports):
        return url
    scores, before = read_scores(work)
    registered = storage.read_json(storage.join(work.run_root, REGISTERED))
    chosen = choose(read_hypotheses(work), EXAMPLES)
    keys = {hypothesis.key for hypothesis in chosen}
    rows = {row["key"]: row for row in read_rows(work.audio_root) if row["key"] in keys}
    reader = ShardReader(work.audio_root)
    examples = [Example(answer=hypothesis, samples=reader.waveform(rows[hypothesis.key])) for hypothesis in chosen]
    data = ReportData(
        model=work.model_name,
        architecture=work.architecture.title,
        version=str(registered["version"]),
        alias=work.config.alias,
        preset=work.config.preset,
        run=work.run_root,
        url=registered["folder"],
        dataset=work.dataset,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        about=_about(work),
        stages=reports,
        metrics=_history(work),
        recipe=work.preset.model_dump(mode="json"),
        scores=scores,
        before=before,
        examples=examples,
        lineage=storage.read_json(storage.join(registered["folder"], "lineage.json")),
        notes=list(work.architecture.deviations),
    )
    storage.write_text(url, write_report(data))
    return url


def trained_model(work: Workspace) -> tuple[SpeechLLM, Any]:
    """The whole model, encoders included, with the weights of the last stage; and its tokenizer."""
    preset = work.preset
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    tokenizer.add_tokens(work.architecture.added_tokens(preset))
    model = work.architecture.build(preset, tokenizer, seed=preset.recipe.seed + work.config.seed)
    load_weights(storage.join(work.stages[-1][1], "weights.safetensors"), model)
    if work.codebook is not None and model.codebook is not None:
        model.codebook.data.copy_(load_codebook(work.codebook[0])[0])
    return model, tokenizer


def _assemble(work: Workspace, url: str) -> dict[str, Any]:
    """Write the model's folder to its place; returns its manifest (file -> sha256), which the caller writes last."""
    scores, before = read_scores(work)
    with tempfile.TemporaryDirectory(dir=storage.scratch(url)) as name:
        folder = Path(name)
        model, tokenizer = trained_model(work)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for role, encoder in work.encoders.items():
            storage.write_json(storage.join(str(folder), f"preprocessor_{role}.json"), encoder.preprocessing())
        recipe = work.preset.model_dump(mode="json")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        origin = lineage(
            [work.audio],
            list(work.features.values()),
            recipe,
            _pretrained(work),
            {"stages": [u for _, u in work.stages]},
        )
        storage.write_json(str(folder / "lineage.json"), origin)
        storage.write_json(str(folder / "metrics.json"), flat(scores))
        record = evaluation_record(Link.model_validate(work.audio.model_dump()), read_hypotheses(work))
        (folder / EVALUATION).write_text(record.model_dump_json() + "\n")
        card = model_card(_card(work, model), [work.audio], scores, before, origin)
        (folder / "README.md").write_text(card)
        files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
        storage.upload_folder(folder, url, keep=False)
    return {"architecture": work.config.arch, "files": files}


def _card(work: Workspace, model: SpeechLLM) -> CardData:
    stages = work.preset.recipe.stages
    trained = {name for stage in stages for name in model.trained_by(stage.train)}
    rows = read_rows(work.audio_root)
    return CardData(
        name=work.model_name,
        architecture=work.architecture.title,
        preset=work.config.preset,
        about=_about(work),
        paper=work.architecture.paper,
        languages=tuple(sorted({row["language"] for row in rows if row["language"]})),
        tasks=tuple(dict.fromkeys(task for stage in stages for task in stage.tasks)),
        base_models=tuple(_references(work)),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for name, p in model.named_parameters() if name in trained),
        deviations=work.architecture.deviations,
    )


def _about(work: Workspace) -> str:
    speakers = len(Counter(row["speaker"] for row in read_rows(work.audio_root)))
    return (
        f"{work.architecture.title} ({work.config.preset} preset), trained with Earloom on {work.dataset}: "
        f"{work.audio.samples:,} clips, {work.audio.seconds / 60:.1f} minutes, {speakers} speakers."
    )


def _references(work: Workspace) -> list[str]:
    parts = [*(spec.weights for spec in work.preset.encoders.values()), work.preset.backbone.weights]
    return [reference for reference in dict.fromkeys(parts) if reference]


def _pretrained(work: Workspace) -> dict[str, str]:
    return {reference: folder_digest(resolve(reference)) for reference in _references(work)}


def _history(work: Workspace) -> list[dict[str, Any]]:
    return [line for _, url in work.stages for line in read_metrics(url)]


def _measured(work: Workspace, scores: Scores) -> dict[str, str]:
    """What `earloom models` shows of a version."""
    metric, value, _ = main_metric(scores)
    return {"data": f"{work.audio.dataset}/{work.audio.version}", "metric": metric, "value": f"{value:.6g}"}


def _note(written: dict[str, Any]) -> str:
    return f"{written['name']} version {written['version']} @{written['alias']}"
