"""Look before training: the plan of a stage, and what exactly it learns. The same code as the training workers run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from components.batching import explain, explain_page
from components.batching.loader import StageData, batch_of, global_batch, load_step
from components.batching.preview import PlanSummary
from components.batching.stage_plan import FOLDER, PAGE, chosen_layout, open_plan, publish_plan
from components.shards.index import read_rows
from infra import storage
from models.recipe import Stage
from pipelines.config import RunConfig
from pipelines.locate import Workspace
from pipelines.progress import console
from pipelines.train import training_settings
from pipelines.workers.model import StageAudio, stage_fit, trainable_model


class StageView:
    """The stages of a run as a training worker sees them, without training."""

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.settings = training_settings(work)
        torch.set_num_threads(self.settings["threads"])  # what a fit was found for
        every = read_rows(work.audio_root)
        self.rows, self.audio = every.where("split", "train"), StageAudio(self.settings, every)
        self.model, self.tokenizer = trainable_model(self.settings)

    def planned(self, number: int) -> PlanSummary:
        """Plan a stage if it is not planned yet; training will find the plan there."""
        stage, url = self.work.stages[number]
        seed = self.settings["seed"] + number
        fit = stage_fit(self.settings, stage)
        layout = chosen_layout(stage, self.model, fit.layout if fit else None)
        audio = self.audio.of(number, self.model)
        return publish_plan(url, stage, self.rows, self.model, self.tokenizer, audio.measure, seed, layout, audio.read)

    def data(self, number: int) -> StageData:
        """The samples and batches of a stage."""
        self.planned(number)
        stage, url = self.work.stages[number]
        return open_plan(url, stage, self.rows, self.model, self.tokenizer, self.audio.of(number, self.model).read)


def show_plans(config: RunConfig, only: str | None = None) -> None:
    """A table of the stages' plans, and where the pages are that draw them.

    A packed row has no padding; what is `unused` of its token budget is not computed either.
    """
    view = StageView(Workspace(config))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "layout", "tasks"):
        table.add_column(column)
    for column in ("samples", "left out", "steps", "epochs", "tokens a step", "samples a step", "padding", "unused"):
        table.add_column(column, justify="right")
    pages = []
    for number in _numbers(view.work, only):
        stage, url = view.work.stages[number]
        summary = view.planned(number)
        table.add_row(
            stage.name,
            summary.layout,
            ", ".join(f"{task} {share:.0%}" for task, share in summary.tasks.items()),
            f"{summary.samples:,}",
            f"{summary.left_out:,}",
            f"{summary.steps:,}",
            f"{min(stage.epochs, summary.epochs):g}",
            f"{summary.batch_tokens.median:,.0f}",
            f"{summary.batch_samples.median:,.0f}",
            f"{summary.padding if summary.layout == 'bucketed' else 0:.2%}",
            f"{summary.padding:.2%}" if summary.layout == "packed" else "–",
        )
        pages.append(f"{stage.name}: {storage.join(url, FOLDER, PAGE)}")
    console.print(table)
    for page in pages:
        console.print(page, soft_wrap=True)


def explain_stage(config: RunConfig, stage_name: str | None, step: int, clip: str | None, page: Path | None) -> None:
    """Print what each token of a global batch, or of the samples of one clip, is and whether it is learnt."""
    view = StageView(Workspace(config))
    number = _numbers(view.work, stage_name)[0]
    data = view.data(number)
    stage = data.stage
    if clip is not None:
        chosen = [i for i in range(len(data.samples)) if data.rows[int(data.samples.row[i])]["key"] == clip]
        if not chosen:
            raise ValueError(
                f"stage {stage.name!r} has no sample of clip {clip!r}: it is not in the train split, or no task fits"
            )
        batches, numbers = [batch_of(data, np.array(chosen))], chosen
    else:
        if not 0 <= step < len(data.plan):
            raise ValueError(f"stage {stage.name!r} has steps 0 to {len(data.plan) - 1}, not {step}")
        batches, numbers = load_step(data, step), global_batch(data, step).tolist()
    explained = _explained(view, stage, batches[0], [data.sample(i).key for i in numbers])
    explain_page.show(explained, console)
    if page is not None:
        page.write_text(explain_page.explain_page(explained))
        console.print(f"page: {page}", soft_wrap=True)


def _explained(view: StageView, stage: Stage, batch: Any, keys: list[str]) -> explain.Explained:
    return explain.explain_batch(
        batch,
        view.tokenizer,
        keys,
        explain.label_count(batch, stage, view.tokenizer),
        explain.units_of(view.work.architecture, view.work.preset, view.tokenizer),
        stage=stage,
        groups=explain.trainable_groups(view.model, stage),
    )


def _numbers(work: Workspace, only: str | None) -> list[int]:
    names = [stage.name for stage, _ in work.stages]
    if only is None:
        return list(range(len(names)))
    if only not in names:
        raise ValueError(f"no stage {only!r}; the recipe has: {', '.join(names)}")
    return [names.index(only)]
