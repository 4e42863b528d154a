"""The bare page that the report is poured into: style sheet and a few HTML helpers that escape what they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --paper: #faf9f7; --card: #ffffff; --ink: #1d2026; --soft: #5d6470; --rule: #e4e1dc; --wash: #f2f0ec;
  --c0: #2563b8; --c1: #d9772b; --c2: #1f8f74; --c3: #a8488f; --c4: #b8921b; --c5: #6a58c4; --c6: #c5434b;
  --c7: #64798a;
  --good: #1b7a4b; --goodwash: #d9f0e2; --bad: #b3362f; --badwash: #fae0dd; --warn: #8a5a00; --warnwash: #fdecc8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #121418; --card: #1a1d23; --ink: #e8e6e1; --soft: #9aa2ae; --rule: #2f353f; --wash: #2a2f38;
  --c0: #6ea8f5; --c1: #f0a05c; --c2: #4fc3a1; --c3: #d986c3; --c4: #dcbb51; --c5: #a397f0; --c6: #ee7f83;
  --c7: #94a9ba;
  --good: #6fd3a0; --goodwash: #17382a; --bad: #f2938c; --badwash: #43211f; --warn: #f0c264; --warnwash: #3d3013; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 2.5rem; line-height: 1.1; letter-spacing: -.025em; margin: 4px 0 10px; font-weight: 680;
  overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; letter-spacing: -.012em; margin: 64px 0 6px; font-weight: 650; }
h3 { font-size: 1rem; margin: 32px 0 4px; font-weight: 650; }
p { margin: 6px 0 14px; max-width: 72ch; }
a { color: var(--c0); }
code { font: .92em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.eyebrow { color: var(--soft); font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
.facts, .legend { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 0; padding: 0;
  color: var(--soft); font-size: .9rem; }
.facts b { color: var(--ink); font-weight: 600; }
.legend { font-size: .85rem; margin: 10px 0 2px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
nav { margin-top: 18px; font-size: .9rem; display: flex; flex-wrap: wrap; gap: 4px 18px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.lead { font-size: 1.22rem; line-height: 1.45; margin: 34px 0 22px; max-width: 60ch; text-wrap: pretty; }
.note { color: var(--soft); font-size: .9rem; }
.warn { background: var(--warnwash); color: var(--warn); border-radius: 8px; padding: 9px 14px; font-size: .93rem;
  max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 16px; margin: 22px 0; }
.tile, figure, .example { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; }
.tile { padding: 16px 20px 18px; }
.tile h3 { margin: 0; color: var(--soft); font-size: .86rem; font-weight: 550; }
.tile .big { font-size: 2.5rem; line-height: 1.2; font-weight: 640; letter-spacing: -.03em;
  font-variant-numeric: tabular-nums; }
.tile .big small { font-size: 1.2rem; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.tile p { margin: 2px 0 0; font-size: .85rem; color: var(--soft); }
.tile p.up { color: var(--good); }
.tile p.down { color: var(--bad); }
.range { position: relative; height: 6px; background: var(--wash); border-radius: 3px; margin: 12px 0 8px; }
.range i { position: absolute; top: 0; height: 6px; border-radius: 3px; background: var(--c0); opacity: .38;
  min-width: 2px; }
.range b { position: absolute; top: -4px; width: 3px; height: 14px; border-radius: 2px; background: var(--c0);
  margin-left: -1.5px; }
.range u { position: absolute; top: -2px; width: 2px; height: 10px; background: var(--soft); margin-left: -1px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: .89rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .86rem; padding: 0 0 6px; }
th { text-align: left; font-weight: 550; color: var(--soft); font-size: .82rem;
  border-bottom: 1px solid var(--rule); padding: 6px 12px 6px 0; white-space: nowrap; }
td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.n + td:not(.n), th.n + th:not(.n) { padding-left: 16px; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.group td { border-bottom: 0; padding-top: 18px; font-weight: 600; }
tr.all td { font-weight: 600; }
td.bar { width: 150px; }
td.bar .range { margin: 9px 0 0; }
.confusion { width: auto; }
.confusion td { text-align: center; min-width: 52px; padding: 6px 10px; border: 2px solid var(--paper); }
.confusion td.right { outline: 2px solid var(--c0); outline-offset: -3px; }
.confusion th { border: 0; padding: 6px 10px; }
figure { margin: 14px 0; padding: 16px 18px 8px; min-width: 0; }
figcaption { font-size: .88rem; color: var(--soft); }
figcaption b { color: var(--ink); font-weight: 620; margin-right: 4px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); gap: 16px; }
.pair figure { margin: 0; }
.chart { overflow-x: auto; }
.chart svg, .spectrogram svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.stage { fill: var(--ink); font-weight: 550; }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--soft); stroke-opacity: .5; }
svg line.stage { stroke: var(--soft); stroke-dasharray: 3 4; stroke-opacity: .7; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1; stroke-opacity: .38; }
svg .area { fill-opacity: .82; }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--ink); fill-opacity: .07; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(470px, 100%), 1fr)); gap: 18px;
  margin-top: 16px; }
.example { overflow: hidden; display: flex; flex-direction: column; }
.example header { display: flex; justify-content: space-between; gap: 12px; padding: 12px 18px; font-size: .84rem;
  color: var(--soft); }
.example header b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.example .body { padding: 12px 18px 16px; }
.badge { white-space: nowrap; border-radius: 99px; padding: 1px 10px; background: var(--wash); color: var(--ink);
  font-size: .8rem; align-self: start; font-variant-numeric: tabular-nums; }
.badge.ok { background: var(--goodwash); color: var(--good); }
.spectrogram { background: #07060f; }
.spectrogram svg text { fill: #ffffffd0; font-size: 10.5px; paint-order: stroke; stroke: #07060fcc; stroke-width:
  2.5px; }
audio { width: 100%; height: 38px; margin-bottom: 6px; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: 5px 14px; }
dt { color: var(--soft); font-size: .82rem; padding-top: 2px; }
dd { margin: 0; overflow-wrap: anywhere; line-height: 1.5; }
dd.before { color: var(--soft); }
ins, del, mark { border-radius: 4px; padding: 0 3px; color: inherit; text-decoration-thickness: 1.5px; }
mark { background: var(--warnwash); }
ins { background: var(--goodwash); text-decoration: underline; text-underline-offset: 3px; }
del { background: var(--badwash); }
details { border: 1px solid var(--rule); border-radius: 12px; background: var(--card); margin: 10px 0; padding: 0
  18px; }
summary { cursor: pointer; padding: 11px 0; font-weight: 600; }
pre { margin: 0 0 16px; padding: 14px 16px; overflow-x: auto; background: var(--wash); border-radius: 8px; font:
  .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; tab-size: 2; }
footer { margin-top: 72px; color: var(--soft); font-size: .85rem; border-top: 1px solid var(--rule); padding-top:
  16px; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 600px) { main { padding: 28px 16px 64px; } h1 { font-size: 1.9rem; } .lead { font-size: 1.08rem;
  } }
@media print { body { background: #fff; } audio, nav { display: none; } figure, .example, .tile { break-inside:
  avoid; } }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing from anywhere; `body` is HTML, `title` text."""
    # The policy also holds if a text should ever get through unescaped: no script runs, nothing is fetched.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(anchor: str, title: str, inside: str) -> str:
    """A headed part of the page; empty if there is nothing inside."""
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(title)}</h2>\n{inside}</section>\n'
        if inside
        else ""
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), caption: str = "") -> str:
    """A table of texts (escaped); the columns in `numeric` are aligned right."""
    kind = ['class="n"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f'<th scope="col" {kind[i]}>{escape(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[i]}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def details(title: str, text: str) -> str:
    """A closed fold with preformatted text."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Small `name value` pairs in a row; pairs without a value are left out."""
    items = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in pairs if value)
    return f'<ul class="facts">{items}</ul>'


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u202f%"


def duration(seconds: float) -> str:
    """75 → 1 min 15 s; 5400 → 1 h 30 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
