"""From the lines of metrics.jsonl to the charts of a run: loss, learning rate, mixture, clip length, speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from components.evaluation.plots import Band, Line, area_chart, legend, line_chart, number, smooth

MIXTURE_BINS = 120  # columns of the mixture chart

Row = Mapping[str, Any]


class StageRows(NamedTuple):
    """The steps of one stage, and where on the x axis of the whole run its step 0 lies."""

    name: str
    rows: list[Row]
    offset: float


def by_stage(metrics: Iterable[Row]) -> list[StageRows]:
    """Rows with a step, sorted by step within their stage; of a step that was redone after a resume, the last counts.

    Stages come in order of appearance. If each counts its own steps, they are laid end to end.
    """
    stages: dict[str, dict[float, Row]] = {}
    for row in metrics:
        if isinstance(row.get("step"), int | float):
            stages.setdefault(str(row.get("stage", "")), {})[float(row["step"])] = row
    found: list[StageRows] = []
    end = 0.0
    for name, steps in stages.items():
        first, last = min(steps), max(steps)
        offset = end if found and first <= end else 0.0
        found.append(StageRows(name, [steps[step] for step in sorted(steps)], offset))
        end = offset + last
    return found


def points(stage: StageRows, field: str, whole_run: bool = True) -> list[tuple[float, float]]:
    """(step, value) of a field; a value that is no number (loss NaN) becomes nan, a missing one is left out."""
    return [
        (float(row["step"]) + (stage.offset if whole_run else 0), to_number(row[field]))
        for row in stage.rows
        if row.get(field) is not None
    ]


def to_number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def bands(stages: Sequence[StageRows]) -> list[Band]:
    """Where each stage lies on the x axis of the whole run."""
    ends = [stage.offset + float(stage.rows[-1]["step"]) for stage in stages]
    starts = [stages[0].offset + float(stages[0].rows[0]["step"]), *ends[:-1]] if stages else []
    return [Band(start, end, stage.name) for start, end, stage in zip(starts, ends, stages, strict=True)]


def loss_charts(stages: Sequence[StageRows], per_row: int = 2) -> str:
    """One chart a stage, as losses of different stages are not comparable; the mean drawn over the raw values."""
    charts = []
    for stage in stages:
        raw = points(stage, "loss", whole_run=False)
        if not raw:
            continue
        mean = smooth(raw, max(3, len(raw) // 12))
        lines = (
            [Line("loss", raw, 0, faint=True), Line("loss, mean", mean, 0)]
            if len(raw) >= 12
            else [Line("loss", raw, 0)]
        )
        heights = [y for _, y in raw if math.isfinite(y)]
        log = bool(heights) and min(heights) > 0 and max(heights) / min(heights) > 20
        width = 1000 if len(stages) == 1 else 1000 / per_row - 12
        chart = line_chart(
            lines,
            title=f"Loss of stage {stage.name}",
            x_label="step",
            y_label="loss (log)" if log else "loss",
            log=log,
            width=width,
            height=280,
        )
        last = f" · ends at {number(mean[-1][1])}" if mean else ""
        broken = sum(not math.isfinite(y) for _, y in raw)
        warning = f" · {broken} step{'s' if broken > 1 else ''} without a finite loss" if broken else ""
        charts.append((stage.name, f"{len(raw)} steps{last}{warning}", chart))
    return "".join(_figure(name, note, chart) for name, note, chart in charts)


def learning_rate_chart(stages: Sequence[StageRows]) -> str:
    return _over_run(stages, "lr", "Learning rate", "learning rate")


def seconds_chart(stages: Sequence[StageRows]) -> str:
    return _over_run(stages, "seconds_mean", "Mean clip length of a batch", "seconds")


def speed_chart(stages: Sequence[StageRows]) -> str:
    return _over_run(stages, "tokens_per_second", "Training speed", "tokens / s")


def mixture_chart(stages: Sequence[StageRows]) -> str:
    """Share of each task in the batches, averaged over neighbouring steps; empty if none was recorded."""
    columns = [_shares(stage) for stage in stages]
    size = -(-sum(map(len, columns)) // MIXTURE_BINS) or 1
    # Columns do not reach over the border of a stage, where the mixture jumps.
    groups = [rows[i : i + size] for rows in columns for i in range(0, len(rows), size)]
    names = list(dict.fromkeys(name for group in groups for _, shares in group for name in shares))
    if not names:
        return ""
    xs = [sum(x for x, _ in group) / len(group) for group in groups]
    layers = {
        name: [sum(shares.get(name, 0.0) for _, shares in group) / len(group) for group in groups] for name in names
    }
    chart = area_chart(xs, layers, title="Curriculum mixture", x_label="step", bands=bands(stages))
    return legend(names) + chart


def _shares(stage: StageRows) -> list[tuple[float, dict[str, float]]]:
    """(step, task -> share) of the rows that recorded one."""
    found = []
    for row in stage.rows:
        shares = row.get("tasks")
        if isinstance(shares, Mapping) and shares:
            values = {str(task): to_number(share) for task, share in shares.items()}
            finite = {task: max(0.0, value) for task, value in values.items() if math.isfinite(value)}
            found.append((float(row["step"]) + stage.offset, finite))
    return found


def _over_run(stages: Sequence[StageRows], field: str, title: str, y_label: str) -> str:
    lines = []
    for stage in stages:
        raw = points(stage, field)
        noisy = field != "lr" and len(raw) >= 60  # a learning rate is exact, nothing to average
        lines += [Line(f"{y_label}, each step", raw, 0, faint=True)] if noisy else []
        lines.append(Line(y_label, smooth(raw, len(raw) // 12) if noisy else raw, 0))
    if not any(math.isfinite(y) for line in lines for _, y in line.points):
        return ""
    return line_chart(lines, title=title, x_label="step", y_label=y_label, zero=True, bands=bands(stages), height=220)


def _figure(name: str, note: str, chart: str) -> str:
    return f"<figure><figcaption><b>{escape(name)}</b> <span>{escape(note)}</span></figcaption>{chart}</figure>"
