"""Example clips: which to show, and each as a card with spectrogram, player, reference and answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from components.audio.encode import to_flac
from components.evaluation.diff import Piece, diff
from components.evaluation.metrics import Hypothesis, rate_of, score
from components.evaluation.normalise import is_unspaced
from components.evaluation.page import percent
from components.evaluation.plots import nice_ticks, number
from components.evaluation.spectrogram import mel_height, spectrogram_png
from components.schema import SAMPLE_RATE

MAX_SECONDS = 30.0  # of a clip that the page carries; the rest is cut off and said
RIGHT_TO_LEFT = frozenset({"ar", "fa", "he", "ur"})


class Example(BaseModel):
    """A clip to look at and listen to: its answer, and its samples, mono 16 kHz float32 `(samples,)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    answer: Hypothesis
    samples: np.ndarray[Any, np.dtype[np.float32]] | None = None


def choose(hypotheses: Sequence[Hypothesis], count: int = 8) -> list[Hypothesis]:
    """Clips from the best to the worst of every task, evenly spaced over the ranking, tasks in turn.

    Clips of the split `test` if there are any. The best and the worst are always among them, so that a page shows
    neither successes nor failures only. Deterministic: ties go by key.
    """
    rows = [row for row in hypotheses if row.split == "test"] or list(hypotheses)
    tasks: dict[str, list[Hypothesis]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    shares = {task: count // len(tasks) + (i < count % len(tasks)) for i, task in enumerate(tasks)}
    chosen = []
    for task, members in tasks.items():
        ranked = sorted(members, key=lambda row: (error_of(row), row.key))
        places = np.linspace(0, len(ranked) - 1, min(shares[task], len(ranked))).round().astype(int)
        chosen += [ranked[i] for i in dict.fromkeys(places.tolist())]
    return chosen


def error_of(answer: Hypothesis) -> float:
    """Error rate of one clip in its task's metric; 1 where it is undefined but the answer is wrong."""
    result = score([answer]).tasks[answer.task]
    value = rate_of(result.all, result.metric)
    if value is None:
        return 1.0 - result.all.exact
    return 1.0 - value if result.metric == "exact" else value


def example_card(example: Example) -> str:
    """An <article>; every text in it is escaped."""
    answer = example.answer
    about = " · ".join(
        part for part in (answer.task, answer.language, answer.speaker, answer.split, f"{answer.seconds:.1f} s") if part
    )
    error = error_of(answer)
    badge = "correct" if error == 0 else "wrong" if answer.task.startswith("label:") else f"{percent(error)} errors"
    head = (
        f"<header><span><b>{escape(answer.key)}</b><br>{escape(about)}</span>"
        f'<span class="badge{" ok" if error == 0 else ""}">{badge}</span></header>'
    )
    return f'<article class="example">{head}{_sound(example)}</article>'


def _sound(example: Example) -> str:
    body = f"<dl>{_texts(example.answer)}</dl>"
    if example.samples is None or not len(example.samples):
        return f'<div class="body">{body}</div>'
    samples = np.clip(np.nan_to_num(example.samples.astype(np.float32)), -1, 1)[: int(MAX_SECONDS * SAMPLE_RATE)]
    cut = f'<p class="note">The first {MAX_SECONDS:.0f} seconds.</p>' if len(samples) < len(example.samples) else ""
    audio = base64.b64encode(to_flac(samples)).decode()
    name = escape(example.answer.key)
    player = f'<audio controls preload="metadata" aria-label="{name}" src="data:audio/flac;base64,{audio}"></audio>'
    picture = f'<div class="spectrogram">{_spectrogram(samples, example.answer.key)}</div>'
    return f'{picture}<div class="body">{player}{cut}{body}</div>'


def _spectrogram(samples: np.ndarray[Any, np.dtype[np.float32]], key: str) -> str:
    """The picture with seconds along the bottom and kilohertz at the left, 520 x 150."""
    width, height = 520, 150
    picture = base64.b64encode(spectrogram_png(samples)).decode()
    seconds = len(samples) / SAMPLE_RATE
    words = escape(f"Spectrogram of {key}, {seconds:.1f} seconds, 0 to 8 kilohertz")
    marks = []
    for hertz in (500, 1000, 2000, 4000):
        at = height * (1 - mel_height(hertz))
        marks.append(f'<text x="6" y="{at + 4:.1f}">{hertz / 1000:g}{" kHz" if hertz == 4000 else ""}</text>')
    for tick in nice_ticks(0, seconds, 4):
        if 0 < tick < 0.97 * seconds:
            marks.append(
                f'<text x="{width * tick / seconds:.1f}" y="{height - 5}" text-anchor="middle">{number(tick)} s</text>'
            )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">'
        f'<image href="data:image/png;base64,{picture}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f"{''.join(marks)}</svg>"
    )


def _texts(answer: Hypothesis) -> str:
    reference, said = diff(answer.reference, answer.hypothesis, answer.language)
    attributes = f'lang="{escape(answer.language)}"' if answer.language else ""
    if (answer.language or "")[:2] in RIGHT_TO_LEFT:
        attributes += ' dir="rtl"'
    gap = "" if is_unspaced(answer.language) else " "
    rows = [("Reference", "", reference), ("Model", "", said)]
    if answer.before is not None:
        rows.append(("Before", "before", diff(answer.reference, answer.before, answer.language)[1]))
    return "".join(
        f'<dt>{name}</dt><dd class="{kind}" {attributes}>{gap.join(map(_marked, pieces)) or "<i>nothing</i>"}</dd>'
        for name, kind, pieces in rows
    )


def _marked(piece: Piece) -> str:
    tag = {"substitute": "mark", "delete": "del", "insert": "ins", "equal": ""}[piece.mark]
    text = escape(piece.text)
    return f"<{tag}>{text}</{tag}>" if tag else text
