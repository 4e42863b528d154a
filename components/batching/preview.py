"""What a plan will do, before it runs: a summary in numbers and one page of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from components.batching.order import competence, difficulty
from components.batching.plan import Plan
from components.batching.samples import Samples
from components.evaluation.page import facts, page, percent, section, table
from components.evaluation.plots import COLOURS, Band, Line, area_chart, legend, line_chart, number
from models.recipe import Stage

POINTS = 200  # of a chart: each is the mean of neighbouring steps
RANKED = 200_000  # entries from which the rank correlation is estimated


class Spread(NamedTuple):
    """Of a quantity over all batches."""

    least: int
    median: float
    most: int


class PlanSummary(BaseModel):
    """A plan in numbers; shares are of samples and between 0 and 1."""

    layout: str
    steps: int
    epochs: int
    samples: int
    """how many the steps take in all, repetitions counted"""
    left_out: int
    tokens: int
    padding: float
    """bucketed: share of the padded rectangles that is padding; packed: of the budget that is unused, without the last
    batch of each epoch"""
    batch_samples: Spread
    batch_tokens: Spread
    tasks: dict[str, float]
    collections: dict[str, float]
    order_kept: float | None
    """Spearman correlation of difficulty and place in the first epoch; None without a curriculum, or if all samples are
    equally difficult"""


def summarise(plan: Plan, samples: Samples, stage: Stage) -> PlanSummary:
    """Count what a plan holds; a few passes over its entries, also for millions of them."""
    tokens = _sums(samples.tokens, plan, np.arange(len(plan) + 1))
    return PlanSummary(
        layout=plan.layout,
        steps=len(plan),
        epochs=len(np.unique(plan.epochs)),
        samples=len(plan.order),
        left_out=len(plan.left_out),
        tokens=int(tokens.sum()),
        padding=_padding(plan, samples, tokens, stage.batch_tokens),
        batch_samples=_spread(np.diff(plan.starts)),
        batch_tokens=_spread(tokens),
        tasks=_shares(samples.task, samples.tasks, plan),
        collections=_shares(samples.collection, samples.collections, plan),
        order_kept=_order_kept(plan, samples, stage),
    )


def plan_page(name: str, stage: Stage, plan: Plan, samples: Samples) -> str:
    """One HTML page that needs nothing else: the summary, the mixture, the difficulty and the batches over the steps.

    `name`: of the run or the preset. ValueError for a curriculum order that there is not.
    """
    summary = summarise(plan, samples, stage)
    head = f'<p class="eyebrow">{escape(name)}</p><h1>Plan of stage {escape(stage.name)}</h1>' + facts(
        [
            ("steps", number(summary.steps)),
            ("epochs", f"{stage.epochs:g}"),
            ("layout", plan.layout),
            ("curriculum", _curriculum_name(stage)),
        ]
    )
    if not len(plan):
        return page(f"Plan of {stage.name}", head + '<p class="warn">No sample of this stage can be used.</p>')
    edges = np.unique(np.linspace(0, len(plan), POINTS + 1).astype(np.int64))
    middles = ((edges[:-1] + edges[1:] - 1) / 2).tolist()
    bands = _epoch_bands(plan)
    tasks = _mixture("Tasks", samples.task, samples.tasks, plan, edges, bands)
    several = len(samples.collections) > 1
    collections = _mixture("Data sets", samples.collection, samples.collections, plan, edges, bands) if several else ""
    body = [
        head,
        section("numbers", "In numbers", _numbers(summary)),
        section("mixture", "Mixture", tasks + collections),
        section("order", "Order", _order_figures(stage, plan, samples, edges, middles, bands)),
        section("batches", "Batches", _batch_figures(stage, plan, samples, edges, middles, bands)),
        section("pacing", "Pacing", _pacing_figure(stage)),
    ]
    return page(f"Plan of {stage.name}", "".join(body))


# ---- numbers --------------------------------------------------------------------------------------------------------


def _sums(values: NDArray[np.generic], plan: Plan, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of a value over the entries of the steps `edges[i]:edges[i + 1]`, `(len(edges) - 1,)`."""
    if len(edges) < 2:
        return np.zeros(0)
    sums: NDArray[np.float64] = np.add.reduceat(values[plan.order], plan.starts[edges[:-1]], dtype=np.float64)
    return sums


def _means(values: NDArray[np.generic], plan: Plan, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """As `_sums`, per entry; values that are not finite (a measure that a row lacks) are left out."""
    finite = np.isfinite(values)
    counts = _sums(finite, plan, edges)
    sums = _sums(np.where(finite, values, 0), plan, edges)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means


def _padding(plan: Plan, samples: Samples, tokens: NDArray[np.float64], budget: int) -> float:
    if not len(plan):
        return 0.0
    if plan.layout == "bucketed":
        longest = np.maximum.reduceat(samples.tokens[plan.order], plan.starts[:-1]).astype(np.int64)
        return 1 - float(tokens.sum()) / int((longest * np.diff(plan.starts)).sum())
    full = np.append(plan.epochs[:-1] == plan.epochs[1:], False)
    return 1 - float(tokens[full].mean()) / budget if full.any() else 0.0


def _spread(values: NDArray[np.int64] | NDArray[np.float64]) -> Spread:
    return Spread(int(values.min()), float(np.median(values)), int(values.max())) if len(values) else Spread(0, 0.0, 0)


def _shares(kind: NDArray[np.integer], names: Sequence[str], plan: Plan) -> dict[str, float]:
    counts = np.bincount(kind[plan.order], minlength=len(names)) / max(1, len(plan.order))
    return {name: float(share) for name, share in zip(names, counts, strict=True) if share}


def _order_kept(plan: Plan, samples: Samples, stage: Stage) -> float | None:
    first = plan.order[: plan.starts[np.searchsorted(plan.epochs, 1)]]
    if not len(first) or stage.curriculum.order == "random" or not stage.curriculum.epochs:
        return None
    score = difficulty(stage, samples)[first[:: -(-len(first) // RANKED)]]
    score = score[np.isfinite(score)]
    return spearman(np.arange(len(score)), score)


def spearman(one: NDArray[np.generic], other: NDArray[np.generic]) -> float | None:
    """Rank correlation, ties share the mean of their ranks; None where one of the two does not vary."""
    first, second = _ranks(one), _ranks(other)
    if len(first) < 2 or not np.ptp(first) or not np.ptp(second):
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: NDArray[np.generic]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return middle[place]


# ---- page -----------------------------------------------------------------------------------------------------------


def _numbers(summary: PlanSummary) -> str:
    kept = "–" if summary.order_kept is None else f"{summary.order_kept:.4f}"
    spreads = [
        (f"{what} of a batch", f"{number(s.least)} – {number(s.median)} – {number(s.most)}")
        for what, s in (("samples", summary.batch_samples), ("tokens", summary.batch_tokens))
    ]
    rows = [
        ("samples", f"{summary.samples:,}"),
        ("left out", f"{summary.left_out:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("padding" if summary.layout == "bucketed" else "unused budget", percent(summary.padding)),
        *spreads,
        ("rank correlation of difficulty and place", kept),
    ]
    shares = [("task", *share) for share in summary.tasks.items()]
    shares += [("data set", *share) for share in summary.collections.items()]
    texts = [(kind, name, percent(share)) for kind, name, share in shares]
    caption = "Least, median and most where there are three numbers"
    return table(["", "plan"], rows, numeric=[1], caption=caption) + table(
        ["", "name", "share of samples"], texts, numeric=[2]
    )


def _mixture(
    title: str,
    kind: NDArray[np.integer],
    names: Sequence[str],
    plan: Plan,
    edges: NDArray[np.int64],
    bands: Sequence[Band],
) -> str:
    """Shares over the steps; only the most frequent names have a colour of their own."""
    counts = np.diff(plan.starts[edges])
    column = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    cells = np.bincount(column * len(names) + kind[plan.order], minlength=len(counts) * len(names))
    shares = cells.reshape(len(counts), len(names)) / counts[:, None]  # (points, names)
    frequent = np.argsort(-cells.reshape(shares.shape).sum(axis=0), kind="stable")
    shown = frequent if len(names) <= COLOURS else frequent[: COLOURS - 1]
    layers = {names[i]: shares[:, i].tolist() for i in sorted(shown.tolist()) if shares[:, i].any()}
    if len(shown) < len(names):
        layers["others"] = np.maximum(0.0, 1 - shares[:, shown].sum(axis=1)).tolist()
    middles = ((edges[:-1] + edges[1:] - 1) / 2).tolist()
    chart = area_chart(middles, layers, title=f"{title} over the steps", x_label="step", bands=bands)
    return _figure(title, "share of the samples", legend(list(layers)) + chart)


def _order_figures(
    stage: Stage,
    plan: Plan,
    samples: Samples,
    edges: NDArray[np.int64],
    middles: Sequence[float],
    bands: Sequence[Band],
) -> str:
    def draw(title: str, note: str, values: NDArray[np.generic], colour: int) -> str:
        points = list(zip(middles, _means(values, plan, edges).tolist(), strict=True))
        lines = [Line(title, points, colour)]
        chart = line_chart(lines, title=f"{title} over the steps", x_label="step", y_label="mean", bands=bands)
        return _figure(title, note, chart)

    seconds = draw("Seconds", "of audio, mean of a sample", samples.seconds, 0)
    if stage.curriculum.order in ("random", "duration"):
        return seconds
    scores = difficulty(stage, samples)
    scores = -scores if stage.curriculum.reverse else scores
    return draw("Difficulty", f"mean {stage.curriculum.order} of a sample", scores, 1) + seconds


def _batch_figures(
    stage: Stage,
    plan: Plan,
    samples: Samples,
    edges: NDArray[np.int64],
    middles: Sequence[float],
    bands: Sequence[Band],
) -> str:
    steps = np.diff(edges)
    counts = np.diff(plan.starts[edges]) / steps
    tokens = _sums(samples.tokens, plan, edges) / steps

    def draw(title: str, note: str, values: NDArray[np.float64], colour: int) -> str:
        lines = [Line(title, list(zip(middles, values.tolist(), strict=True)), colour)]
        chart = line_chart(
            lines, title=f"{title} of a batch", x_label="step", y_label="a batch", zero=True, bands=bands, height=220
        )
        return _figure(title, note, chart)

    return draw("Tokens", f"of a batch, budget {number(stage.batch_tokens)}", tokens, 2) + draw(
        "Samples", "of a batch", counts, 3
    )


def _pacing_figure(stage: Stage) -> str:
    """The share of samples, easiest first, that may come at each point of the epoch."""
    curriculum = stage.curriculum
    if curriculum.order == "random" or not curriculum.epochs:
        return ""
    points = [(100 * i / POINTS, 100 * competence(curriculum, i / POINTS)) for i in range(POINTS + 1)]
    chart = line_chart(
        [Line("available", points, 4)],
        title="Share of the samples that is available",
        x_label="share of the epoch, %",
        y_label="available, %",
        zero=True,
        height=220,
    )
    return _figure("Pacing", f"{curriculum.pacing}: the easiest samples that may come, %", chart)


def _epoch_bands(plan: Plan) -> list[Band]:
    """Where each epoch lies; none for a single one."""
    borders = [*np.flatnonzero(np.diff(plan.epochs, prepend=-1)).tolist(), len(plan)]
    epochs = plan.epochs[borders[:-1]].tolist()
    if len(epochs) < 2 or len(epochs) > POINTS:
        return []
    return [
        Band(start, end - 1, f"epoch {epoch + 1}")
        for start, end, epoch in zip(borders, borders[1:], epochs, strict=False)
    ]


def _curriculum_name(stage: Stage) -> str:
    curriculum = stage.curriculum
    if curriculum.order == "random" or not curriculum.epochs:
        return "none"
    return f"{curriculum.order}, {curriculum.pacing}{', reversed' if curriculum.reverse else ''}"


def _figure(name: str, note: str, chart: str) -> str:
    return f"<figure><figcaption><b>{escape(name)}</b> <span>{escape(note)}</span></figcaption>{chart}</figure>"
