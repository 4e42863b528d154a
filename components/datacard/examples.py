"""The examples of a data-set card: clips to look at and listen to, with what is known of them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from components.audio.encode import to_flac
from components.datacard.pieces import MAX_NAME, MEASURES, plain, text
from components.datacard.plots import sound_picture
from components.evaluation.page import duration
from components.evaluation.plots import number
from components.schema import SAMPLE_RATE, Clip

MAX_AUDIO = 200_000  # bytes of an example's FLAC: eight of them and their pictures stay below 3 MB


class Example(NamedTuple):
    """A clip to hear: its row of the index and, unless its shard is damaged, its record and its beginning."""

    row: Mapping[str, Any]
    clip: Clip | None = None
    samples: np.ndarray | None = None  # (samples,) float32
    fault: str = ""


def examples_part(examples: Sequence[Example]) -> str:
    """Each clip with picture, player, texts and measures; empty if there is none."""
    if not examples:
        return ""
    note = '<p class="note">Chosen by split, language and duration, not by quality.</p>'
    return f'{note}<div class="examples">{"".join(map(_example, examples))}</div>'


def _example(example: Example) -> str:
    row = example.row
    about = " · ".join(str(row[name]) for name in ("split", "language", "speaker", "gender") if row[name])
    badge = f'<span class="badge">{duration(row["seconds"])}</span>'
    head = f"<header><span><b>{text(row['key'])}</b><br>{text(about, 200)}</span>{badge}</header>"
    if example.clip is None or example.samples is None:
        fault = f'<p class="warn">This clip cannot be read: {text(example.fault)}</p>'
        return f'<article class="example">{head}<div class="body">{fault}</div></article>'
    samples, audio = _heard(example.samples)
    seconds = len(samples) / SAMPLE_RATE
    name = escape(str(row["key"]))
    player = f'<audio controls preload="metadata" aria-label="{name}" src="data:audio/flac;base64,{audio}"></audio>'
    cut = f'<p class="note">The first {duration(seconds)}.</p>' if len(samples) < row["samples"] else ""
    lines = "".join(f"<dt>{escape(title)}</dt><dd>{inside}</dd>" for title, inside in _said(example.clip, row))
    body = f'<div class="body">{player}{cut}<dl>{lines}</dl></div>'
    return f'<article class="example">{head}{sound_picture(samples, str(row["key"]))}{body}</article>'


def _heard(samples: np.ndarray) -> tuple[np.ndarray, str]:
    """As much of the beginning as fits into the page, and its FLAC in base64."""
    audio = to_flac(samples)
    while len(audio) > MAX_AUDIO:
        samples = samples[: int(len(samples) * min(0.9, MAX_AUDIO / len(audio)))]
        audio = to_flac(samples)
    return samples, base64.b64encode(audio).decode()


def _said(clip: Clip, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is known of a clip: titles and markup."""
    if clip.text:
        language = f' lang="{escape(clip.language)}"' if clip.language else ""
        yield "Text", f'<span dir="auto"{language}>{text(clip.text)}</span>'
    for language, said in list(clip.translation.items())[:3]:
        yield f"In {language}"[:MAX_NAME], text(said)
    if clip.caption:
        yield "Caption", text(clip.caption)
    if clip.labels:
        yield "Labels", text(", ".join(f"{name}: {plain(value)}" for name, value in clip.labels.items()), 300)
    measured = [
        f"{title.lower()} {number(factor * row[name])}\u202f{unit}"
        for name, (title, unit, factor) in MEASURES.items()
        if name not in ("seconds", "text_length") and row.get(name) is not None
    ]
    if measured:
        yield "Measures", escape("; ".join(measured))
    if clip.marks:
        yield "Noticed", text(", ".join(clip.marks), 300)
