"""How the card of a data set looks: HTML from what was counted. Everything that came with the data is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from components.datacard.examples import Example, examples_part
from components.datacard.facts import (
    NOT_DECLARED,
    Group,
    Reason,
    count_labels,
    count_marks,
    group_rejects,
    groups,
    spread,
)
from components.datacard.pieces import (
    CSS,
    MAX_NAME,
    MEASURES,
    Html,
    bar,
    bar_table,
    found_list,
    hours,
    named,
    plain,
    shares_table,
    text,
)
from components.datacard.plots import histogram_chart, in_words
from components.evaluation.page import details, duration, facts, page, percent, section
from components.schema import SAMPLE_RATE, AudioManifest
from components.shards.arrays import numbers
from infra.units import volume

MAX_ROWS = 40  # of a table of languages, genders, marks or licences
MAX_LABELS, MAX_VALUES = 24, 12  # labels, and values of each
MAX_FOUND = 20  # examples of duplicates and of each kind of leak


class Contents(NamedTuple):
    """All that a card is made of."""

    manifest: AudioManifest
    table: pa.Table  # the index, without its texts
    rejects: pa.Table
    checks: Mapping[str, Any]
    examples: Sequence[Example]


def card_page(contents: Contents) -> str:
    """A whole HTML document that loads nothing and runs nothing."""
    table, manifest = contents.table, contents.manifest
    parts = [
        ("splits", "Splits, languages and speakers", _splits(table)),
        ("examples", "Examples", examples_part(contents.examples)),
        ("measures", "Durations, texts and quality", _measures(table)),
        ("labels", "Labels", _labels(table)),
        ("marks", "What was noticed", _marks(table)),
        ("aside", "What was set aside", _aside(contents.rejects)),
        ("checks", "Duplicates and leaks", _checks(contents.checks)),
        ("origin", "Sources and licences", _origin(manifest)),
    ]
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, inside in parts if inside)
    body = "".join(section(*part) for part in parts)
    foot = "<footer>Written by Earloom; everything on this page is inside this file.</footer>"
    title = f"{manifest.dataset} {manifest.version} · data set card"
    return page(title, f"<style>{CSS}</style>{_head(contents, links)}{body}{foot}")


def _head(contents: Contents, links: str) -> str:
    manifest, table = contents.manifest, contents.table
    known = [
        named(count, noun)
        for noun in ("speaker", "language")
        if (count := pc.count_distinct(table[noun]).as_py())  # of those that are declared
    ]
    size = sum(shard.bytes for shard in manifest.shards)
    lead = f"{named(manifest.samples, 'clip')}, {hours(manifest.seconds)} of audio"
    found = manifest.samples + manifest.rejected
    tiles = [
        ("Clips", f"{manifest.samples:,}", f"{duration(manifest.seconds / max(manifest.samples, 1))} on average"),
        ("Audio", hours(manifest.seconds), f"{manifest.seconds / 3600:,.2f} hours"),
        ("Set aside", f"{manifest.rejected:,}", f"{percent(manifest.rejected / max(found, 1))} of {found:,}"),
        ("Shards", f"{len(manifest.shards):,}", f"{size:,} bytes"),
    ]
    boxes = "".join(
        f'<div class="tile"><h3>{name}</h3><div class="big">{escape(big)}</div><p>{escape(small)}</p></div>'
        for name, big, small in tiles
    )
    about = [("version", manifest.version), ("digest", manifest.digest), ("size", volume(size))]
    return (
        f'<header><p class="eyebrow">Earloom · data set card</p><h1>{text(manifest.dataset)}</h1>{facts(about)}'
        f'<nav aria-label="Sections">{links}</nav></header>\n'
        f'<p class="lead">{escape(", ".join([lead, *known]))}.</p><div class="tiles small">{boxes}</div>\n'
    )


# ---- splits, languages, speakers ------------------------------------------------------------------------------------


def _splits(table: pa.Table) -> str:
    whole = max(pc.sum(table["samples"]).as_py() or 0, 1) / SAMPLE_RATE
    order = {"train": 0, "dev": 1, "test": 2, NOT_DECLARED: 4}
    splits = sorted(groups(table, ("split",)), key=lambda group: order.get(group.names[0], 3))
    colours = {split.names[0]: i for i, split in enumerate(splits)}
    rows = [
        (
            text(name, MAX_NAME),
            f"{split.clips:,}",
            hours(split.seconds),
            f"{split.speakers:,}" if split.speakers else "–",
            bar([(name, split.seconds / whole)], [colours[name]]),
        )
        for split in splits
        for name in split.names
    ]
    by_split = bar_table(("split", "clips", "audio", "speakers", "share of the audio"), rows, numeric=(1, 2, 3))
    return by_split + _languages(table, colours, whole) + _genders(table, list(colours))


def _languages(table: pa.Table, colours: Mapping[str, int], whole: float) -> str:
    both = {group.names: group for group in groups(table, ("language", "split"))}
    languages, rows = groups(table, ("language",)), []
    for language in languages[:MAX_ROWS]:
        name = language.names[0]
        shares = [(split, both[name, split].seconds / whole) for split in colours if (name, split) in both]
        counts = [f"{both[name, split].clips:,}" if (name, split) in both else "–" for split in colours]
        stretches = bar(shares, [colours[split] for split, _ in shares])
        rows.append((text(name, MAX_NAME), f"{language.clips:,}", hours(language.seconds), *counts, stretches))
    head = ("language", "clips", "audio", *colours, "share of the audio, by split")
    found = bar_table(head, rows, numeric=range(1, 3 + len(colours)))
    return f"<h3>Languages</h3>{found}{_more(languages, 'language')}"


def _genders(table: pa.Table, splits: Sequence[str]) -> str:
    """Clips and speakers of each gender in each split; nothing if neither is declared anywhere."""
    if table["speaker"].null_count == table["gender"].null_count == table.num_rows:
        return ""
    both = {group.names: group for group in groups(table, ("gender", "split"))}
    genders = groups(table, ("gender",))
    rows = [
        (text(gender.names[0], MAX_NAME), _people(gender), *(_people(both.get((*gender.names, s))) for s in splits))
        for gender in genders[:MAX_ROWS]
    ]
    found = bar_table(("gender", "all", *splits), rows)
    return f"<h3>Speakers by gender</h3>{found}{_more(genders, 'gender')}"


def _people(group: Group | None) -> str:
    if group is None:
        return "–"
    clips = named(group.clips, "clip")
    return f"{named(group.speakers, 'speaker')}, {clips}" if group.speakers else clips


def _more(found: Sequence[object], noun: str) -> str:
    more = len(found) - MAX_ROWS
    return f'<p class="note">And {named(more, noun)} with fewer clips.</p>' if more > 0 else ""


# ---- what was measured, labelled and noticed ------------------------------------------------------------------------


def _measures(table: pa.Table) -> str:
    figures = []
    for name, (title, unit, factor) in MEASURES.items():
        values = numbers(pc.cast(table[name], pa.float64()), math.nan) * factor
        values = values[values > 0] if name == "text_length" else values
        found = spread(values, whole=name == "text_length")
        if found is not None:
            some = "" if found.clips == table.num_rows else f" Of {named(found.clips, 'clip')}."
            said = in_words(found, unit) + some
            note = f'<p class="note">{escape(said[0].upper() + said[1:])}</p>'
            caption = f"<figcaption><b>{title}</b> {unit}</figcaption>"
            varies = found.quantiles[0] < found.quantiles[4]
            chart = histogram_chart(found, title, unit) if varies else ""
            figures.append(f"<figure>{caption}{chart}{note}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _labels(table: pa.Table) -> str:
    labels, counted = count_labels(table["labels"])
    figures = []
    for label in labels[:MAX_LABELS]:
        caption = f"<figcaption><b>{text(label.name, MAX_NAME)}</b> {named(len(label.counts), 'value')}</figcaption>"
        whole = sum(label.counts.values())
        figures.append(f"<figure>{caption}{shares_table(label.counts, whole, MAX_VALUES, 'value')}</figure>")
    notes = [f"{len(labels) - MAX_LABELS:,} more labels are not shown."] if len(labels) > MAX_LABELS else []
    if counted < table.num_rows:
        notes.append(f"Counted over {counted:,} of {table.num_rows:,} clips: those with the most common labels.")
    note = f'<p class="note">{" ".join(notes)}</p>' if notes and figures else ""
    return f'<div class="columns">{"".join(figures)}</div>{note}' if figures else ""


def _marks(table: pa.Table) -> str:
    marks = count_marks(table["marks"])
    return shares_table(marks, table.num_rows, MAX_ROWS, "mark") if marks else ""


# ---- what was set aside, and where it comes from --------------------------------------------------------------------


def _aside(rejects: pa.Table) -> str:
    parts = []
    for step in group_rejects(rejects):
        rows = [(_reason(reason), f"{reason.inputs:,}") for reason in step.reasons]
        if step.others:
            rows.append((Html("<i>other reasons</i>"), f"{step.others:,}"))
        found = bar_table(("reason", "inputs"), rows, numeric=(1,))
        parts.append(f"<h3>{text(step.name, MAX_NAME)}: {named(step.inputs, 'input')}</h3>{found}")
    return "".join(parts)


def _reason(reason: Reason) -> Html:
    items = []
    for reject in reason.examples:
        name = text(reject["original"] or reject["id"], 160)
        identity = "" if not reject["id"] or reject["id"] in name else f" ({text(reject['id'], 160)})"
        said = "" if reject["reason"] == reason.text else f": {text(reject['reason'], 300)}"
        items.append(f"{name}{identity}{said}")
    head = "the input" if reason.inputs == 1 else "the inputs" if reason.inputs == len(items) else "some of them"
    return Html(f"{text(reason.text)}<details><summary>{head}</summary>{found_list(items)}</details>")


def _checks(checks: Mapping[str, Any]) -> str:
    doubles, leaks = checks.get("duplicates"), checks.get("leaks")
    parts = []
    if isinstance(doubles, dict):
        found = [(text(kind, MAX_NAME), f"{n:,}") for kind, n in doubles.items() if isinstance(n, int)]
        if found:
            parts.append(f"<h3>Duplicates</h3>{bar_table(('kind', 'clips'), found, numeric=(1,))}")
            parts.append(found_list(_found(doubles.get("examples"))))
    if isinstance(leaks, list):
        rows = []
        for leak in (leak for leak in leaks if isinstance(leak, dict)):
            between = text(" and ".join(map(str, _listed(leak.get("splits")))), MAX_NAME)
            kind = Html(f"{text(leak.get('kind', ''), MAX_NAME)}{found_list(_found(leak.get('examples')))}")
            rows.append((kind, between, f"{leak.get('count', 0):,}"))
        none = "<p>Nothing of one split was found in another.</p>"
        parts.append(f"<h3>Leaks between splits</h3>{bar_table(('what', 'in', 'count'), rows, (2,)) if rows else none}")
    return "".join(parts)


def _found(examples: object) -> list[str]:
    return [text(" = ".join(map(plain, _listed(each))), 300) for each in _listed(examples)[:MAX_FOUND]]


def _listed(value: object) -> list[object]:
    if isinstance(value, dict):
        return [f"{name} {plain(inner)}" for name, inner in value.items()]
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _origin(manifest: AudioManifest) -> str:
    most_first = dict(sorted(manifest.licences.items(), key=lambda item: (-item[1], item[0])))
    whole = sum(most_first.values())
    licences = shares_table(most_first, whole, MAX_ROWS, "licence") if most_first else ""
    sources = found_list(text(source, 300) for source in manifest.sources)
    settings = details("How it was made", json.dumps(manifest.config, ensure_ascii=False, indent=2, sort_keys=True))
    return f"{licences}<h3>Sources</h3>{sources}{settings}"
