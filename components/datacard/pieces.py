"""The small parts of a data-set card: texts of anybody's, tables with bars, and how numbers are said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from components.evaluation.page import duration
from components.evaluation.plots import COLOURS

MAX_LETTERS = 600  # of a text
MAX_NAME = 80  # letters of a name in a table
MEASURES = {  # column → title, unit, factor
    "seconds": ("Duration", "s", 1),
    "text_length": ("Length of the transcripts", "letters", 1),
    "loudness": ("Loudness", "LUFS", 1),
    "peak": ("Peak", "dBFS", 1),
    "snr": ("Signal to noise", "dB", 1),
    "bandwidth": ("Bandwidth", "Hz", 1),
    "clipped": ("Clipped samples", "%", 100),
    "silence": ("Pauses", "%", 100),
}
CSS = """
.tiles.small { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.tiles.small .tile { padding: 12px 16px 14px; }
.tiles.small .tile .big { font-size: 1.7rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 16px;
  margin: 16px 0; align-items: start; }
.charts figure { margin: 0; padding: 14px 16px 4px; }
.charts figure p { font-size: .82rem; margin: 4px 0 10px; }
.columns { columns: 3 290px; column-gap: 16px; margin: 16px 0; }
.columns figure { margin: 0 0 16px; padding: 14px 16px 4px; break-inside: avoid; }
.columns .scroll { margin: 4px 0; }
.columns td { padding: 4px 12px 4px 0; }
.columns tr:last-child td { border: 0; }
svg .bar { fill: var(--c0); }
svg .bar:hover { fill: var(--c1); }
svg .wave { fill: #fecf6d; }
.stack { display: flex; height: 9px; min-width: 80px; margin-top: 8px; border-radius: 4px; overflow: hidden;
  background: var(--wash); }
.stack i { min-width: 1px; }
td.bar { width: 32%; }
td.text { overflow-wrap: anywhere; min-width: 120px; }
td details { border: 0; background: none; margin: 0; padding: 0; color: var(--soft); font-size: .84rem; }
td summary { padding: 2px 0; font-weight: 400; }
ul.found { margin: 4px 0 8px; padding-left: 18px; font-size: .84rem; overflow-wrap: anywhere; color: var(--soft); }
.facts li { min-width: 0; overflow-wrap: anywhere; }
.example header span:first-child { min-width: 0; }
"""


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def text(value: object, most: int = MAX_LETTERS) -> Html:
    """A text of anybody's on one line: escaped, no control characters, its direction its own, cut where it is long."""
    line = "".join(sign if sign.isprintable() else " " for sign in str(value)[: most + 1])
    return Html(f"<bdi>{escape(line[:most] + ('…' if len(line) > most else ''))}</bdi>")


def bar(shares: Sequence[tuple[str, float]], colours: Sequence[int] = (0,)) -> Html:
    """A bar of coloured stretches, one for each name and share of the whole width, between 0 and 1."""
    said = escape("; ".join(f"{name[:MAX_NAME]} {100 * share:.1f} %" for name, share in shares))
    stretches = "".join(
        f'<i style="width:{100 * share:.2f}%;background:var(--c{colours[i % len(colours)] % COLOURS})"></i>'
        for i, (_, share) in enumerate(shares)
        if share > 0
    )
    return Html(f'<div class="stack" role="img" aria-label="{said}" title="{said}">{stretches}</div>')


def bar_table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table whose cells are text, or markup where they are Html; the first cell of a row may be long."""
    kinds = ["n" if i in numeric else "" if i else "text" for i in range(len(head))]
    top = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = []
    for row in rows:
        cells = []
        for kind, cell in zip(kinds, row, strict=True):
            inside = cell if isinstance(cell, Html) else escape(cell)
            cells.append(f'<td class="{"bar" if inside.startswith("<div") else kind}">{inside}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{inside}</div>'


def shares_table(counts: Mapping[str, int], whole: int, most: int, head: str) -> str:
    """Names, counts of clips and bars of their share of `whole`; those after `most` are counted in one row."""
    most += len(counts) == most + 1  # its name takes no more room than "1 other"
    shown = list(counts.items())[:most]
    rows = [(text(name, MAX_NAME), f"{count:,}", bar([(name, count / max(whole, 1))])) for name, count in shown]
    if len(counts) > most:
        rest = sum(counts.values()) - sum(count for _, count in shown)
        rows.append((Html(f"<i>{len(counts) - most:,} others</i>"), f"{rest:,}", bar([("others", rest / whole)])))
    return bar_table((head, "clips", ""), rows, numeric=(1,))


def found_list(items: Iterable[str]) -> str:
    """A small list of markup; empty if there is none."""
    inside = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="found">{inside}</ul>' if inside else ""


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f} h" if seconds >= 360_000 else duration(seconds)


def named(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plain(value: object) -> str:
    """A value of JSON as a text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
