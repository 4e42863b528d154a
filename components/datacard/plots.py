"""The pictures of a data-set card as inline SVG: histograms, and a clip's waveform over its spectrogram."""

from __future__ import annotations

import base64
import itertools
from html import escape

import numpy as np

from components.datacard.facts import Spread
from components.datacard.pieces import named
from components.evaluation.plots import nice_ticks, number
from components.evaluation.spectrogram import mel_height, spectrogram_png
from components.schema import SAMPLE_RATE

WIDTH, HEIGHT = 360, 170  # of a histogram: about the width of a phone, so that its letters keep their size
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 12, 26  # pixels around the bars
PICTURE, WAVE, MELS = 520, 52, 150  # width of a clip's picture, heights of its parts
COLUMNS = 260  # of a waveform
QUIETEST = 0.03  # peak of the quietest waveform that is drawn to its full height


def histogram_chart(spread: Spread, title: str, unit: str) -> str:
    """Bars over round edges; each says its range and its clips when pointed at, and a sentence says it all."""
    low, high, top = float(spread.edges[0]), float(spread.edges[-1]), max(int(spread.counts.max()), 1)
    bottom = HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = []
    for tick in nice_ticks(0, top, 3):
        if tick <= top and float(tick).is_integer():
            at = bottom - tick / top * (bottom - TOP)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for (start, end), count in zip(itertools.pairwise(spread.edges.tolist()), spread.counts.tolist(), strict=True):
        if count:
            left, right, tall = across(start), across(end), max(count / top * (bottom - TOP), 1.0)
            said = escape(f"{number(start)} to {number(end)} {unit}: {named(count, 'clip')}")
            place = f'x="{left:.1f}" y="{bottom - tall:.1f}"'
            size = f'width="{max(right - left - 0.8, 0.8):.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar" {place} {size}><title>{said}</title></rect>')
    for tick in nice_ticks(low, high, 4):
        if low <= tick <= high:
            at = across(tick)
            anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    words = escape(f"Histogram. {title}: {in_words(spread, unit)}")
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
    return f'<div class="chart">{picture}</div>'


def in_words(spread: Spread, unit: str) -> str:
    """A sentence about a histogram."""
    least, fifth, middle, rest, most = (_with(unit, value) for value in spread.quantiles)
    if spread.quantiles[0] == spread.quantiles[4]:
        return f"{middle} for {'all ' if spread.clips > 1 else ''}{named(spread.clips, 'clip')}."
    text = f"median {middle}, mean {_with(unit, spread.mean)}; 90 % between {fifth} and {rest}, "
    text += f"all between {least} and {most}."
    outside = [f"{named(n, 'clip')} {where}" for n, where in ((spread.below, "below"), (spread.above, "above")) if n]
    return text + (f" Not drawn: {', '.join(outside)} the bars." if outside else "")


def _with(unit: str, value: float) -> str:
    return f"{number(value)}\u202f{unit}".strip()


def sound_picture(samples: np.ndarray, name: str) -> str:
    """Waveform and log-mel spectrogram over one time axis, of `(samples,)` float32 mono at 16 kHz."""
    seconds, height = len(samples) / SAMPLE_RATE, WAVE + MELS
    picture = base64.b64encode(spectrogram_png(samples)).decode()
    marks = []
    for hertz in (500, 1000, 2000, 4000):
        at = WAVE + MELS * (1 - mel_height(hertz))
        marks.append(f'<text x="6" y="{at + 4:.1f}">{hertz / 1000:g}{" kHz" if hertz == 4000 else ""}</text>')
    for tick in nice_ticks(0, seconds, 4):
        if 0 < tick < 0.97 * seconds:
            at = PICTURE * tick / seconds
            marks.append(f'<text x="{at:.1f}" y="{height - 5}" text-anchor="middle">{number(tick)} s</text>')
    words = escape(f"Waveform and spectrogram of {name}, {seconds:.1f} seconds, 0 to 8 kilohertz")
    return (
        f'<div class="spectrogram"><svg viewBox="0 0 {PICTURE} {height}" role="img" aria-label="{words}">'
        f'<path class="wave" d="{_wave(samples)}"/>'
        f'<image href="data:image/png;base64,{picture}" y="{WAVE}" width="{PICTURE}" height="{MELS}" '
        f'preserveAspectRatio="none"/>{"".join(marks)}</svg></div>'
    )


def _wave(samples: np.ndarray) -> str:
    """The outline between the lowest and the highest sample of each column, drawn to the peak of the clip."""
    if not len(samples):
        return f"M0 {WAVE / 2} H{PICTURE}"
    starts = np.unique(np.linspace(0, len(samples), min(COLUMNS, len(samples)), endpoint=False).astype(int))
    scale = (WAVE / 2 - 3) / max(float(np.abs(samples).max()), QUIETEST)
    highest = WAVE / 2 - scale * np.maximum.reduceat(samples, starts)
    lowest = WAVE / 2 - scale * np.minimum.reduceat(samples, starts) + 0.6  # so that silence is a line
    across = starts / len(samples) * PICTURE
    upper = [f"{x:.1f} {y:.1f}" for x, y in zip(across.tolist(), highest.tolist(), strict=True)]
    under = [f"{x:.1f} {y:.1f}" for x, y in zip(across.tolist(), lowest.tolist(), strict=True)]
    return "M" + "L".join(upper + under[::-1]) + "Z"
