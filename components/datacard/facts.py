"""What a data-set card says, counted from the index and the rejects: whole columns at a time, never row by row."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from components.schema import SAMPLE_RATE
from components.shards.arrays import mask, numbers, rows_at
from components.shards.duplicates import codes
from infra.storage import shown

NOT_DECLARED = "not declared"
NO_REASON = "no reason is given"
BARS = 40  # of a histogram, about
MAX_DIFFERENT = 20_000  # sets of labels or marks that are read; of a data set that has more, the most common
MAX_REASONS = 12  # that a step lists
MAX_EXAMPLES = 5  # of a reason
MAX_COMPARED = 1000  # texts that are compared to see which of their numbers differ
NUMBER = r"[0-9]+(?:[.,][0-9]+)*"
REJECT = pa.schema([(name, pa.string()) for name in ("original", "id", "reason", "step")])


class Group(NamedTuple):
    """The clips that share some columns."""

    names: tuple[str, ...]  # the values of these columns
    clips: int
    seconds: float
    speakers: int  # declared ones


class Spread(NamedTuple):
    """A histogram of a measure, and its middle and ends. Values outside of the edges are counted, not drawn."""

    edges: np.ndarray  # (bars + 1,)
    counts: np.ndarray  # (bars,)
    below: int
    above: int
    clips: int
    mean: float
    quantiles: tuple[float, float, float, float, float]  # least, 5 %, median, 95 %, most


class Values(NamedTuple):
    """How often each value of a label occurs, the most common first."""

    name: str
    counts: dict[str, int]


class Reason(NamedTuple):
    """Inputs that were set aside for one reason; the numbers in which theirs differ are written `…`."""

    text: str
    inputs: int
    examples: tuple[dict[str, str], ...]  # rejects: original, id, reason, step


class Step(NamedTuple):
    """What one step of ingest set aside."""

    name: str
    inputs: int
    reasons: list[Reason]  # the most common
    others: int  # inputs with other reasons


def groups(table: pa.Table, by: Sequence[str]) -> list[Group]:
    """Clips, seconds and speakers for each combination of the columns `by`, the largest first."""
    if not table.num_rows:
        return []
    coded = [_named(table[name], NOT_DECLARED) for name in by]
    sizes = [len(values) for _, values in coded]
    places, which = np.unique(np.ravel_multi_index([each for each, _ in coded], sizes), return_inverse=True)
    clips = np.bincount(which)
    samples = np.bincount(which, weights=numbers(table["samples"]))
    voices, names = codes(table["speaker"])
    spoken = np.unique(which[voices >= 0] * len(names) + voices[voices >= 0])  # each speaker of a group once
    speakers = np.bincount(spoken // max(1, len(names)), minlength=len(places))
    rows = np.stack(np.unravel_index(places, sizes), axis=1).tolist()
    keys = [tuple(values[code] for code, (_, values) in zip(row, coded, strict=True)) for row in rows]
    seconds = (samples / SAMPLE_RATE).tolist()
    found = [Group(*group) for group in zip(keys, clips.tolist(), seconds, speakers.tolist(), strict=True)]
    return sorted(found, key=lambda group: (-group.clips, group.names))


def _named(column: Any, absent: str) -> tuple[np.ndarray, list[str]]:
    """As `codes`, with a word for the texts that are not there."""
    coded, values = codes(column)
    places: dict[str, int] = {}
    of = [places.setdefault(value or absent, len(places)) for value in values]
    if (coded < 0).any():
        of.append(places.setdefault(absent, len(places)))  # the last, which is what -1 takes
    return np.array(of, int)[coded], list(places)


# ---- numbers --------------------------------------------------------------------------------------------------------


def spread(values: np.ndarray, whole: bool = False) -> Spread | None:
    """The histogram of `(clips,)` numbers, nan where there is none; None if there are none at all.

    Bars have round edges; `whole`: the values are counts, so that no bar is narrower than 1. Where a few values lie
    far out, the bars cover the 99 % in the middle.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    least, low, fifth, middle, rest, high, most = np.quantile(values, (0, 0.005, 0.05, 0.5, 0.95, 0.995, 1)).tolist()
    width = high - low
    start = least if not width or low - least <= width / 2 else low
    end = most if not width or most - high <= width / 2 else high
    edges = bin_edges(0.0 if 0 <= start < 0.4 * end else start, end, whole)
    counts, _ = np.histogram(values, edges)
    below, above = int((values < edges[0]).sum()), int((values > edges[-1]).sum())
    return Spread(edges, counts, below, above, len(values), float(values.mean()), (least, fifth, middle, rest, most))


def bin_edges(low: float, high: float, whole: bool = False, bars: int = BARS) -> np.ndarray:
    """Ascending edges, multiples of a round step, about `bars` of them; `low` and `high` lie between the outer ones."""
    size = max(abs(low), abs(high))
    width = (high - low) / bars or 10.0 ** math.floor(math.log10(max(size, 1e-6)) - 1)
    width = max(width, 1e-9, 1e-9 * size)  # below it, floats run out of digits
    power = 10.0 ** math.floor(math.log10(width))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= width * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    last += last == first or whole  # the last bar takes both of its edges: of counts it would hold twice as many
    return np.round(np.arange(first, last + 1) * step, max(0, 12 - math.floor(math.log10(step))))


# ---- labels and marks -----------------------------------------------------------------------------------------------


def count_labels(column: pa.ChunkedArray) -> tuple[list[Values], int]:
    """How often each label has which value, from the JSON column `labels`, and how many clips were counted.

    The elements of a list count one by one; a dictionary in a label gives labels `outer.inner`.
    """
    names: dict[str, Counter[str]] = {}
    sets, counted = _different(column)
    for text, count in sets:
        for name, value in _flat(json.loads(text)):
            names.setdefault(name, Counter())[value] += count
    return [Values(name, dict(_ranked(counts))) for name, counts in names.items()], counted


def count_marks(column: pa.ChunkedArray) -> dict[str, int]:
    """Clips by what was noticed about them, from the JSON column `marks`; texts that differ in numbers are one."""
    counts: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}
    for listed, count in _different(column)[0]:
        for mark in json.loads(listed):
            alike = re.sub(NUMBER, "#", str(mark))
            counts[alike] += count
            texts.setdefault(alike, []).append(str(mark))
    return {blend(texts[alike]): count for alike, count in _ranked(counts)}


def _different(column: pa.ChunkedArray) -> tuple[list[tuple[str, int]], int]:
    """The most common texts of a column with their counts, and how many rows have one of them."""
    counted = pc.value_counts(pc.drop_null(column))
    counts = numbers(counted.field("counts"))
    order = np.argsort(-counts, kind="stable")[:MAX_DIFFERENT]
    texts = counted.field("values").take(rows_at(order)).to_pylist()
    return list(zip(texts, counts[order].tolist(), strict=True)), int(counts[order].sum())


def _flat(labels: Any) -> Iterable[tuple[str, str]]:
    for name, value in labels.items() if isinstance(labels, dict) else ():
        inner = {f"{name}.{key}": deep for key, deep in value.items()} if isinstance(value, dict) else {name: value}
        for full, found in inner.items():
            for each in found if isinstance(found, list) else [found]:
                if each is not None:
                    yield full, str(each) if type(each) in (str, int) else json.dumps(each, ensure_ascii=False)


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# ---- what was set aside ---------------------------------------------------------------------------------------------


def read_rejects(data: bytes, url: str) -> pa.Table:
    """`rejects.jsonl` as a table of texts. ValueError if it is not that."""
    if not data.strip():
        return pa.Table.from_batches([], REJECT)
    longest = pyarrow.json.ReadOptions(block_size=min(len(data) + 1, 1 << 26))
    form = pyarrow.json.ParseOptions(explicit_schema=REJECT, unexpected_field_behavior="ignore")
    try:
        return pyarrow.json.read_json(io.BytesIO(data), longest, form)
    except pa.ArrowException as error:
        raise ValueError(f"{shown(url)} cannot be read ({error}): run the ingest stage again") from error


def group_rejects(rejects: pa.Table) -> list[Step]:
    """What each step set aside, by reason; steps and reasons with the most inputs first."""
    steps, names = _named(rejects["step"], "read")
    found = []
    for place in np.unique(steps).tolist():
        part = rejects.filter(mask(steps == place))
        reasons, others = _reasons(part)
        found.append(Step(names[place], part.num_rows, reasons, others))
    return sorted(found, key=lambda step: (-step.inputs, step.name))


def _reasons(rejects: pa.Table) -> tuple[list[Reason], int]:
    texts = rejects["reason"]
    coded, alike = _named(pc.replace_substring_regex(texts, NUMBER, "#"), NO_REASON)
    counts = np.bincount(coded, minlength=len(alike))
    rows, starts = np.argsort(coded, kind="stable"), np.cumsum(counts) - counts
    found = []
    for code in np.argsort(-counts, kind="stable")[:MAX_REASONS].tolist():
        some = rows[starts[code] : starts[code] + min(counts[code], MAX_COMPARED)]
        first = rejects.take(rows_at(some[:MAX_EXAMPLES])).to_pylist()
        text = blend([text or NO_REASON for text in texts.take(rows_at(some)).to_pylist()])
        found.append(Reason(text, int(counts[code]), tuple(first)))
    return found, rejects.num_rows - sum(reason.inputs for reason in found)


def blend(texts: Sequence[str]) -> str:
    """The first of texts that are the same but for their numbers, with `…` for each number in which they differ."""
    numbers = zip(*(re.findall(NUMBER, text) for text in texts[:MAX_COMPARED]), strict=False)
    same = iter([len(set(column)) == 1 for column in numbers])
    return re.sub(NUMBER, lambda match: match.group() if next(same, False) else "…", texts[0])


# ---- examples -------------------------------------------------------------------------------------------------------


def choose(table: pa.Table, count: int, longest: float) -> list[int]:
    """Rows of `count` clips of at most `longest` seconds, spread over splits, languages and durations.

    Deterministic: the same table gives the same rows. The golden ratio spreads the durations: however many rows a
    group gives, they are far apart.
    """
    seconds = numbers(table["seconds"])
    splits, languages = (_named(table[name], NOT_DECLARED) for name in ("split", "language"))
    waiting: dict[tuple[str, ...], list[int]] = {}
    for key in _in_turn([group.names for group in groups(table, ("split", "language"))], count):
        alike = [coded == values.index(name) for (coded, values), name in zip((splits, languages), key, strict=True)]
        rows = np.flatnonzero(np.logical_and.reduce(alike) & (seconds <= longest))
        waiting[key] = rows[np.argsort(seconds[rows], kind="stable")].tolist()
    chosen: list[int] = []
    while len(chosen) < count and any(waiting.values()):
        for key in [key for key, rows in waiting.items() if rows][: count - len(chosen)]:
            place = (len(chosen) + 1) * (math.sqrt(5) - 1) / 2 % 1
            chosen.append(waiting[key].pop(int(place * len(waiting[key]))))
    return chosen


def _in_turn(keys: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """At most `count` of the keys, the next always one whose parts were taken the least, of these the first."""
    taken: Counter[tuple[int, str]] = Counter()
    left = list(keys)
    order: list[tuple[str, ...]] = []
    while left and len(order) < count:
        key = min(left, key=lambda key: sum(taken[part] for part in enumerate(key)))
        left.remove(key)
        order.append(key)
        taken.update(enumerate(key))
    return order
