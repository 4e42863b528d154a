"""The report of a run: one HTML page that holds everything it shows and can be mailed, archived or opened offline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from components.evaluation import curves
from components.evaluation.examples import Example, example_card
from components.evaluation.metrics import Metric, Scores, TaskScores, direction, main_metric, metric_name, rate_of
from components.evaluation.page import details, facts, page, percent, section
from components.evaluation.tables import (
    NAMES,
    chain_table,
    confusion_table,
    rates_table,
    tile,
    training_table,
)
from components.schema import StageReport


class ReportData(BaseModel):
    """Everything the page shows. Only `model` and `architecture` are needed; a part without data is left out.

    `metrics` are the lines of metrics.jsonl: `{stage, step, loss, lr, tokens, seconds_mean, tasks: {task: share},
    tokens_per_second}`. `created` is a text, given by the caller, so that the same data make the same page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    architecture: str
    version: str = ""
    alias: str = ""
    preset: str = ""
    run: str = ""
    url: str = ""  # of the model's folder
    dataset: str = ""
    created: str = ""
    about: str = ""  # a sentence on what the model is
    stages: list[StageReport] = Field(default_factory=list)
    metrics: list[dict[str, Any]] = Field(default_factory=list)
    recipe: dict[str, Any] = Field(default_factory=dict)
    scores: Scores | None = None
    before: Scores | None = None
    examples: list[Example] = Field(default_factory=list)
    lineage: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)  # deviations from the paper, limits, warnings


def write_report(data: ReportData) -> str:
    """The whole page as text; deterministic, nothing is loaded from outside, no script."""
    stages = curves.by_stage(data.metrics)
    parts = [
        ("results", "Results by group", _results(data)),
        ("examples", "Examples", _examples(data)),
        ("training", "Training", _training(data, stages)),
        ("curriculum", "Curriculum", _curriculum(stages)),
        ("origin", "Where it comes from", _origin(data)),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, inside in parts if inside)
    body = _head(data, links) + _summary(data) + "".join(section(*part) for part in parts)
    return page(f"{data.model} {data.version} · Earloom report".replace("  ", " "), body + _foot(data))


def lead(scores: Scores, before: Scores | None = None) -> str:
    """The result in one sentence, as text."""
    try:
        name, value, _better = main_metric(scores)
    except ValueError:
        return "No error rate can be given: the references hold no words."
    task, split, _ = name.rsplit("/", 2)
    result = scores.tasks[task]
    rates = result.by_split[split]
    text = f"On {rates.n} {split} clips the {NAMES[result.metric]} of {task} is {percent(value)}"
    if rates.interval:
        text += f" (95\u202f% interval {percent(rates.interval[0])} to {percent(rates.interval[1])})"
    old = _rate_before(before, task, split)
    if old is not None:
        verb = "it was" if old != value else "as it was, at"
        text += f"; before training {verb} {percent(old)}"
    return text + "."


def warnings(scores: Scores, before: Scores | None = None) -> list[str]:
    """What a reader must not overlook: no better than a constant answer, worse than before, too few clips."""
    found = []
    for task, result in scores.tasks.items():
        rates = result.by_split[result.main_split]
        value = rate_of(rates, result.metric)
        old = _rate_before(before, task, result.main_split)
        if result.metric == "exact" and len(result.confusion or {}) > 1 and rates.exact <= rates.majority:
            constant = f"“{rates.majority_answer}” ({percent(rates.majority)})"
            found.append(f"{task}: no better than always answering {constant}.")
        if value is not None and old is not None and is_worse(old, value, result.metric):
            change = f"{percent(old)} → {percent(value)}"
            found.append(f"{task}: {metric_name(result.metric)} is worse than before training ({change}).")
        if rates.n < 30:
            clips = f"{rates.n} {result.main_split} clip{'s' if rates.n != 1 else ''}"
            found.append(f"{task}: only {clips}; the interval counts more than the number.")
    return found


def is_worse(old: float, new: float, metric: Metric) -> bool:
    return new > old if direction(metric) == "lower" else new < old


def _rate_before(before: Scores | None, task: str, split: str) -> float | None:
    result: TaskScores | None = before.tasks.get(task) if before else None
    return rate_of(result.by_split[split], result.metric) if result and split in result.by_split else None


def _head(data: ReportData, links: str) -> str:
    version = f' <span style="font-weight:400;color:var(--soft)">v{escape(data.version)}</span>' if data.version else ""
    about = f"<p>{escape(data.about)}</p>" if data.about else ""
    rows = [("architecture", data.architecture), ("preset", data.preset), ("alias", data.alias and f"@{data.alias}")]
    rows += [("data", data.dataset), ("run", data.run), ("", data.created)]
    return (
        f'<header><p class="eyebrow">Earloom · report of a run</p><h1>{escape(data.model)}{version}</h1>{about}'
        f"{facts(rows)}<nav aria-label='Sections'>{links}</nav></header>\n"
    )


def _summary(data: ReportData) -> str:
    if data.scores is None:
        return '<p class="lead">This run was not evaluated.</p>'
    old = data.before.tasks if data.before else {}
    tiles = "".join(tile(task, result, old.get(task)) for task, result in data.scores.tasks.items())
    warned = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings(data.scores, data.before))
    return f'<p class="lead">{escape(lead(data.scores, data.before))}</p><div class="tiles">{tiles}</div>{warned}\n'


def _results(data: ReportData) -> str:
    if data.scores is None:
        return ""
    parts = []
    for task, result in data.scores.tasks.items():
        parts.append(f"<h3>{escape(task)}</h3>{rates_table(result)}{confusion_table(result)}")
    stated = (
        "Error rates are edits divided by reference length, summed over clips (a character error rate counts "
        "spaces too; languages written without spaces have no word error rate). Intervals are 95\u202f% bootstraps "
        "over clips. "
        f"Texts are compared after this normalisation: {data.scores.normalisation}"
    )
    return "".join(parts) + f'<p class="note">{escape(stated)}</p>'


def _examples(data: ReportData) -> str:
    if not data.examples:
        return ""
    key = (
        '<p class="note">From the best to the worst of each task. In the answers <mark>another word</mark> and '
        "<ins>a word too many</ins>; in the reference also <del>a word that was left out</del>.</p>"
    )
    return f'{key}<div class="examples">{"".join(example_card(example) for example in data.examples)}</div>'


def _training(data: ReportData, stages: list[curves.StageRows]) -> str:
    losses = curves.loss_charts(stages)
    losses = f'<div class="pair">{losses}</div>' if len(stages) > 1 else losses
    return "".join(
        (
            _titled("The chain", chain_table(data.stages)),
            _titled("Training stages", training_table(stages, data.recipe)),
            _titled("Loss", losses),
            _framed("Learning rate", curves.learning_rate_chart(stages)),
            _framed("Speed", curves.speed_chart(stages)),
        )
    )


def _curriculum(stages: list[curves.StageRows]) -> str:
    mixture = _framed("Share of each task in the batches", curves.mixture_chart(stages))
    return mixture + _framed("Mean clip length of a batch", curves.seconds_chart(stages))


def _origin(data: ReportData) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    parts = [f"<h3>Limits and deviations</h3><ul>{notes}</ul>" if notes else ""]
    parts.append(f"<p>The model lies at <code>{escape(data.url)}</code>.</p>" if data.url else "")
    parts += [
        details(title, as_yaml(value)) for title, value in (("Lineage", data.lineage), ("Recipe", data.recipe)) if value
    ]
    return "".join(parts)


def as_yaml(value: Mapping[str, Any]) -> str:
    """YAML of a JSON-able value, keys in their order."""
    plain = json.loads(json.dumps(value, default=str))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110))


def _titled(title: str, inside: str) -> str:
    return f"<h3>{escape(title)}</h3>{inside}" if inside else ""


def _framed(title: str, chart: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b></figcaption>{chart}</figure>" if chart else ""


def _foot(data: ReportData) -> str:
    name = escape(f"{data.model}/{data.version}")
    listen = f" Hear it: <code>earloom listen {name} FILE.wav</code>." if data.version else ""
    return f"<footer>Written by Earloom; everything on this page is inside this file.{listen}</footer>"
