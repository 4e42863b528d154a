"""Tables and tiles of the report: rates of every group, confusion of labels, what each stage did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from components.evaluation.curves import StageRows, points, to_number
from components.evaluation.metrics import Metric, Rates, TaskScores, direction, rate_of
from components.evaluation.page import duration, percent, table
from components.evaluation.plots import number
from components.schema import StageReport

NAMES: dict[Metric, str] = {"wer": "word error rate", "cer": "character error rate", "exact": "accuracy"}
MANY = 12  # groups or labels; more are folded or left out


def tile(task: str, result: TaskScores, before: TaskScores | None) -> str:
    """The number that counts of one task, on the main split, with its interval and what it was before."""
    rates = result.by_split[result.main_split]
    value = rate_of(rates, result.metric)
    old = (
        rate_of(before.by_split[result.main_split], result.metric)
        if before and result.main_split in before.by_split
        else None
    )
    notes = [f"{rates.n} {result.main_split} clip{'s' if rates.n != 1 else ''}, {duration(rates.seconds)}"]
    if rates.interval:
        notes.append(f"95\u202f% interval {percent(rates.interval[0])} to {percent(rates.interval[1])}")
    if result.metric == "exact":
        notes.append(f"always “{rates.majority_answer}” would be {percent(rates.majority)}")
    number_part, _, unit = percent(value).partition("\u202f")
    return (
        f'<div class="tile"><h3>{escape(task)} · {NAMES[result.metric]}</h3>'
        f'<div class="big">{number_part}<small>\u202f{unit}</small></div>{_change(old, value, result.metric)}'
        f"{interval_bar(rates, result.metric, old)}{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>"
    )


def interval_bar(rates: Rates, metric: Metric, old: float | None = None) -> str:
    """The rate as a mark on a 0 to 100 % rail, its interval as a shade, the rate before as a thin mark."""
    value = rate_of(rates, metric)
    if value is None:
        return ""
    low, high = rates.interval or (value, value)
    left, right = 100 * min(low, 1), 100 * min(high, 1)
    before = f'<u style="left:{100 * min(old, 1):.1f}%"></u>' if old is not None else ""
    return (
        f'<div class="range" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>{before}'
        f'<b style="left:{100 * min(value, 1):.1f}%"></b></div>'
    )


def rates_table(result: TaskScores) -> str:
    """All clips, then by split, language and speaker, one table; more than a few speakers go into a fold."""
    groups: list[tuple[str, dict[str, Rates]]] = [("By split", result.by_split)]
    of = f"of the {result.main_split} clips"
    if len(result.by_language) > 1:
        groups.append((f"By language, {of}", result.by_language))
    speakers = result.by_speaker
    folded = ""
    if len(speakers) > MANY:
        rows = _rates_rows([("", speakers)], result.metric)
        folded = f"<details><summary>By speaker, {of} ({len(speakers)})</summary>{rows}</details>"
    elif len(speakers) > 1:
        groups.append((f"By speaker, {of}", speakers))
    return _rates_rows(groups, result.metric) + folded


def _rates_rows(groups: Sequence[tuple[str, dict[str, Rates]]], metric: Metric) -> str:
    head = ["", "clips", "length", *_columns(metric), "95\u202f% interval"]
    rows = []
    for title, members in groups:
        if title:
            rows.append(f'<tr class="group"><td colspan="{len(head) + 1}">{escape(title)}</td></tr>')
        for name, rates in members.items():
            interval = f"{percent(rates.interval[0])} – {percent(rates.interval[1])}" if rates.interval else "–"
            cells = [str(rates.n), duration(rates.seconds), *_cells(rates, metric), interval]
            numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
            rows.append(f'<tr><td>{escape(name)}</td>{numbers}<td class="bar">{interval_bar(rates, metric)}</td></tr>')
    top = "".join(f'<th scope="col"{" class=n" if i else ""}>{name}</th>' for i, name in enumerate(head))
    last = f'<th scope="col">{metric_label(metric)}, 0 – 100\u202f%</th>'
    body = f"<thead><tr>{top}{last}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _columns(metric: Metric) -> list[str]:
    if metric == "exact":
        return ["accuracy", "likeliest label right", "most frequent label", "its share"]
    return ["WER", "CER", "exact", "subst.", "deleted", "inserted"]


def _cells(rates: Rates, metric: Metric) -> list[str]:
    if metric == "exact":
        choice = "–" if rates.choice is None else percent(rates.choice)
        return [percent(rates.exact), choice, rates.majority_answer or "–", percent(rates.majority)]
    edits = [str(rates.substitutions), str(rates.deletions), str(rates.insertions)]
    return [percent(rates.wer), percent(rates.cer), percent(rates.exact), *edits]


def metric_label(metric: Metric) -> str:
    return {"wer": "WER", "cer": "CER", "exact": "accuracy"}[metric]


def confusion_table(result: TaskScores) -> str:
    """Which label was answered for which; answers that are no label are one column. Empty with too many labels."""
    confusion = result.confusion
    if not confusion or not 2 <= len(confusion) <= MANY:
        return ""
    labels = list(confusion)
    other = any(answer not in confusion for answers in confusion.values() for answer in answers)
    columns = [label or "(empty)" for label in labels] + (["other"] if other else [])
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for label, answers in confusion.items():
        counts = [answers.get(column, 0) for column in labels]
        counts += [sum(answers.values()) - sum(counts)] if other else []
        cells = (_confusion_cell(count, sum(counts), i == labels.index(label)) for i, count in enumerate(counts))
        rows.append(f'<tr><th scope="row">{escape(label or "(empty)")}</th>{"".join(cells)}</tr>')
    caption = f"Rows: the label of the {result.main_split} clips. Columns: the answer. Framed: correct."
    body = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="confusion"><caption>{escape(caption)}</caption>{body}</table></div>'


def _confusion_cell(count: int, total: int, right: bool) -> str:
    shade = f"background:color-mix(in srgb, var(--c0) {62 * count / total:.0f}%, transparent)"
    return f'<td class="{"right" if right else ""}" style="{shade}">{count or ""}</td>'


def chain_table(reports: Sequence[StageReport]) -> str:
    """What each step of the chain did, from raw audio to here."""
    rows = [
        [
            report.stage,
            report.state,
            f"{report.done} {report.unit}",
            str(report.reused),
            duration(report.seconds),
            report.note,
        ]
        for report in reports
    ]
    return table(["step", "state", "done", "reused", "time", "note"], rows, numeric=(2, 3, 4)) if rows else ""


def training_table(stages: Sequence[StageRows], recipe: Mapping[str, Any]) -> str:
    """Each training stage: what learned, on which tasks, for how long, and the loss at both ends."""
    declared = {str(stage.get("name")): stage for stage in recipe.get("stages", []) if isinstance(stage, Mapping)}
    rows = []
    for stage in stages:
        plan = declared.get(stage.name, {})
        losses = [loss for _, loss in points(stage, "loss") if math.isfinite(loss)]
        few = max(1, min(len(losses) // 10, 20))
        first, last = (sum(part) / len(part) if part else None for part in (losses[:few], losses[-few:]))
        tokens = sum(to_number(row.get("tokens") or 0) for row in stage.rows)
        rates = sorted(speed for _, speed in points(stage, "tokens_per_second"))
        rows.append(
            [
                stage.name,
                ", ".join(map(str, plan.get("train", []))) or "–",
                ", ".join(map(str, plan.get("tasks", {}))) or "–",
                str(plan.get("loss", "–")),
                str(len(stage.rows)),
                number(tokens),
                number(max((lr for _, lr in points(stage, "lr")), default=0.0)),
                "–" if first is None or last is None else f"{number(first)} → {number(last)}",
                number(rates[len(rates) // 2]) if rates else "–",
            ]
        )
    head = ["stage", "learns", "tasks", "objective", "steps", "tokens", "peak rate", "loss, first → last", "tokens / s"]
    return table(head, rows, numeric=(4, 5, 6, 7, 8)) if rows else ""


def _change(old: float | None, new: float | None, metric: Metric) -> str:
    if old is None or new is None:
        return ""
    better = new < old if direction(metric) == "lower" else new > old
    word = "same as" if new == old else "better than" if better else "worse than"
    kind = "" if new == old else "up" if better else "down"
    return f'<p class="{kind}">{word} before training ({percent(old)})</p>'
