"""Line and area charts as inline SVG: no library, no script, colours from the page's CSS variables.

Colours are numbers: `--c0` to `--c7`. Every point can be hovered (a native tooltip), and each chart has a sentence
that says what it shows for those who cannot see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

COLOURS = 8
LEFT, RIGHT, TOP, BOTTOM = 58.0, 18.0, 26.0, 42.0  # pixels around the plot
MAX_POINTS = 400  # of a line; more are averaged


class Line(NamedTuple):
    """Points in order of x; a point whose y is not finite breaks the line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False


class Band(NamedTuple):
    """A stretch of the x axis with a name: a stage."""

    start: float
    end: float
    name: str


class _Scale(NamedTuple):
    """From values to pixels, and the values that get a tick."""

    place: Callable[[float], float]
    ticks: list[float]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    bands: Sequence[Band] = (),
    width: float = 1000,
    height: float = 280,
) -> str:
    """Lines over one x axis; `log`: logarithmic y (values ≤ 0 are left out); `zero`: the y axis starts at 0."""
    lines = [Line(line.name, thin(line.points), line.colour, line.faint) for line in lines]
    shown = [(x, y) for line in lines for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]
    if not shown:
        return f'<p class="nothing">{escape(title)}: nothing was recorded.</p>'
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    x_scale = _x_scale([x for x, _ in shown], bands, width)
    vertical = (height - BOTTOM, TOP)
    y_scale = _log_scale(low, high, *vertical) if log else _linear_scale(0 if zero else low, high, *vertical, room=True)
    parts = [_frame(x_scale, y_scale, x_label, y_label, width, height), _bands(bands, x_scale, height)]
    for line in lines:
        parts.append(_path(line, x_scale, y_scale, log))
    clear = [line for line in lines if not line.faint]
    parts.append(_hover(clear, x_scale, x_label, width, height))
    return _svg("".join(parts), f"{title}. {_in_words(clear)}", width, height)


def area_chart(
    xs: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    bands: Sequence[Band] = (),
    width: float = 1000,
    height: float = 240,
) -> str:
    """Shares stacked to 100 %, one step-shaped layer a name; `xs` ascending, a value of each layer for each x."""
    if not xs:
        return f'<p class="nothing">{escape(title)}: nothing was recorded.</p>'
    edges = _edges(xs)
    if bands:  # the first and the last column reach to the borders of the run
        edges[0], edges[-1] = min(edges[0], bands[0].start), max(edges[-1], bands[-1].end)
    x_scale = _x_scale(edges, bands, width)
    y_scale = _linear_scale(0, 1, height - BOTTOM, TOP)
    totals = [sum(values) or 1.0 for values in zip(*layers.values(), strict=True)]
    base = [0.0] * len(xs)
    parts = []
    for colour, values in enumerate(layers.values()):
        top = [b + v / t for b, v, t in zip(base, values, totals, strict=True)]
        outline = _stairs(edges, top, x_scale, y_scale) + _stairs(edges, base, x_scale, y_scale)[::-1]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        parts.append(f'<polygon points="{points}" style="fill:var(--c{colour % COLOURS})" class="area"/>')
        base = top
    parts.append(_frame(x_scale, y_scale, x_label, "", width, height, percent=True))
    parts.append(_bands(bands, x_scale, height))
    lines = [
        Line(name, [(x, 100 * v / t) for x, v, t in zip(xs, values, totals, strict=True)])
        for name, values in layers.items()
    ]
    parts.append(_hover(lines, x_scale, x_label, width, height, unit=" %"))
    return _svg("".join(parts), f"{title}. {_in_words(lines, ' %')}", width, height)


def legend(names: Sequence[str]) -> str:
    """Coloured squares with names, in the order of the colours."""
    items = (f'<li><i style="background:var(--c{i % COLOURS})"></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def smooth(points: Sequence[tuple[float, float]], over: int) -> list[tuple[float, float]]:
    """Mean over a window of about that many points around each one, so that it does not lag; nan is skipped.

    At the start the window shrinks, so that the line starts where the values do; at the end it looks back only.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    found = []
    for i, (x, _) in enumerate(finite):
        reach = min(over // 2, i)
        end = min(i + reach + 1, len(finite))
        found.append((x, (sums[end] - sums[i - reach]) / (end - i + reach)))
    return found


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most about that many points, each the mean of its neighbours; a group with a gap in it stays a gap."""
    size = -(-len(points) // most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def number(value: float) -> str:
    """Three significant digits as people write them: 0.000 02 → 2e-5, 12 000 → 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "\u2212")
    for limit, unit, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / unit:.3g}{suffix}".replace("-", "\u2212")
    return (f"{value:.0f}" if size >= 1000 else f"{value:.3g}").replace("-", "\u2212")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) that cover low to high, about `count` of them."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), low + (abs(low) / 2 or 0.5)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _linear_scale(low: float, high: float, start: float, end: float, room: bool = False) -> _Scale:
    """`room` widens the range to the ticks around it; else only the ticks inside are kept."""
    ticks = nice_ticks(low, high)
    if room or high <= low:
        low, high = ticks[0], ticks[-1]
    ticks = [tick for tick in ticks if low - 1e-12 <= tick <= high + 1e-12]
    return _Scale(lambda value: start + (value - low) / (high - low) * (end - start), ticks)


def _log_scale(low: float, high: float, start: float, end: float) -> _Scale:
    factors = (1, 2, 5) if high / low < 100 else (1,)
    candidates = [
        f * 10.0**p for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for f in factors
    ]
    below = max(tick for tick in candidates if tick <= low * 1.001)
    above = min(tick for tick in candidates if tick >= high * 0.999)
    above = above if above > below else below * 10
    span = math.log(above / below)
    ticks = [tick for tick in candidates if below <= tick <= above]
    return _Scale(lambda value: start + math.log(max(value, below) / below) / span * (end - start), ticks)


def _x_scale(xs: Sequence[float], bands: Sequence[Band], width: float) -> _Scale:
    low = min([*xs, *(band.start for band in bands)])
    high = max([*xs, *(band.end for band in bands)])
    scale = _linear_scale(low, high, LEFT, width - RIGHT)
    return _Scale(scale.place, [tick for tick in scale.ticks if float(tick).is_integer()] or scale.ticks)


def _frame(x: _Scale, y: _Scale, x_label: str, y_label: str, width: float, height: float, percent: bool = False) -> str:
    bottom = height - BOTTOM
    parts = []
    for tick in y.ticks:
        at = y.place(tick)
        text = f"{100 * tick:.0f} %" if percent else number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x.ticks:
        parts.append(f'<text x="{x.place(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{width - RIGHT}" y="{height - 5}" text-anchor="end" class="label">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text x="{LEFT - 48}" y="13" class="label">{escape(y_label)}</text>')
    return "".join(parts)


def _bands(bands: Sequence[Band], x: _Scale, height: float) -> str:
    parts = []
    for i, band in enumerate(bands):
        start, end = x.place(band.start), x.place(band.end)
        if i:
            parts.append(
                f'<line class="stage" x1="{start:.1f}" x2="{start:.1f}" y1="{TOP - 12}" y2="{height - BOTTOM}"/>'
            )
        if end - start > 7 * len(band.name):  # else the name would run into its neighbour's
            middle = f'x="{(start + end) / 2:.1f}" y="{TOP - 11}" text-anchor="middle"'
            parts.append(f'<text {middle} class="stage">{escape(band.name)}</text>')
    return "".join(parts)


def _path(line: Line, x: _Scale, y: _Scale, log: bool) -> str:
    runs: list[list[str]] = [[]]
    for px, py in line.points:
        if math.isfinite(py) and (py > 0 or not log):
            runs[-1].append(f"{x.place(px):.1f},{y.place(py):.1f}")
        elif runs[-1]:
            runs.append([])
    style = f"stroke:var(--c{line.colour % COLOURS})"
    kind = "line faint" if line.faint else "line"
    # A run of one point is drawn as a dot: a line of no length with round ends.
    return "".join(
        f'<path class="{kind}" style="{style}" d="M{" L".join(run if len(run) > 1 else run * 2)}"/>'
        for run in runs
        if run
    )


def _hover(lines: Sequence[Line], x: _Scale, x_label: str, width: float, height: float, unit: str = "") -> str:
    """Invisible strips, one an x, whose tooltip says the values there."""
    values: dict[float, list[str]] = {}
    for line in lines:
        for px, py in thin(line.points, 150):
            values.setdefault(px, []).append(
                f"{line.name} {number(py)}{unit}" if math.isfinite(py) else f"{line.name}: no number"
            )
    xs = sorted(values)
    places = [x.place(px) for px in xs]
    middles = [LEFT, *((a + b) / 2 for a, b in itertools.pairwise(places)), width - RIGHT]
    strips = []
    for px, start, end in zip(xs, middles, middles[1:], strict=False):
        text = escape(f"{x_label} {number(round(px))}: " + ", ".join(values[px]))
        size = f'width="{max(end - start, 1):.1f}" height="{height - BOTTOM - TOP:.1f}"'
        strips.append(f'<rect class="hit" x="{start:.1f}" y="{TOP}" {size}><title>{text}</title></rect>')
    return "".join(strips)


def _stairs(edges: Sequence[float], values: Sequence[float], x: _Scale, y: _Scale) -> list[tuple[float, float]]:
    corners = []
    for start, end, value in zip(edges, edges[1:], values, strict=False):
        corners += [(x.place(start), y.place(value)), (x.place(end), y.place(value))]
    return corners


def _edges(xs: Sequence[float]) -> list[float]:
    """Borders half-way between neighbours; the first and the last are the first and last x, widened if alone."""
    if len(xs) == 1:
        return [xs[0] - 0.5, xs[0] + 0.5]
    return [xs[0], *((a + b) / 2 for a, b in itertools.pairwise(xs)), xs[-1]]


def _in_words(lines: Sequence[Line], unit: str = "") -> str:
    said = []
    for line in lines:
        finite = [y for _, y in line.points if math.isfinite(y)]
        if finite:
            said.append(f"{line.name} goes from {number(finite[0])}{unit} to {number(finite[-1])}{unit}")
    return "; ".join(said) + "."


def _svg(inside: str, words: str, width: float, height: float) -> str:
    return (
        f'<div class="chart"><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}" '
        f'style="min-width:{min(0.8 * width, 560):g}px">{inside}</svg></div>'
    )
