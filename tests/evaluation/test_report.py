"""The page: complete, self-contained, and a transcript stays text."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import soundfile as sf

from components.evaluation.examples import Example, choose, error_of
from components.evaluation.metrics import Hypothesis, score, score_before
from components.evaluation.report import ReportData, lead, warnings, write_report
from components.schema import StageReport

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Tags with their attributes, the visible text, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def answers() -> list[Hypothesis]:
    rows = [
        Hypothesis(key=f"clip-{i}", task="asr", split="test", language="en", speaker=f"s{i % 3}", seconds=2.0,
                   reference="one two three four", hypothesis="one two three four"[: 3 + 4 * i], before="no")
        for i in range(5)
    ]  # fmt: skip
    labels = [("anger", "fear"), ("fear", "anger"), ("anger", "anger")]
    rows += [
        Hypothesis(key=f"emo-{i}", task="label:emotion", split="test", reference=a, hypothesis=b, before="anger")
        for i, (a, b) in enumerate(labels)
    ]
    evil = Hypothesis(
        key=EVIL, task=EVIL, split=EVIL, language="en", speaker=EVIL, reference=EVIL, hypothesis=EVIL, before=EVIL
    )
    return [*rows, evil]


def data(**fields: Any) -> ReportData:
    rows = answers()
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    steps = [
        {"stage": stage, "step": i, "loss": 4.0 - i / 20, "lr": 1e-4, "tokens": 100, "seconds_mean": 2.0,
         "tasks": {"asr": 0.5, EVIL: 0.5}, "tokens_per_second": 50.0}
        for stage in ("align", EVIL) for i in range(1, 41)
    ]  # fmt: skip
    known = {
        "model": EVIL, "architecture": EVIL, "version": "3", "alias": "best", "dataset": EVIL, "about": EVIL,
        "url": EVIL,
        "stages": [StageReport(stage="ingest", state="done", done=3, note=EVIL)], "metrics": steps,
        "recipe": {"stages": [{"name": "align", "train": ["connector"], "tasks": {"asr": 1.0}}], EVIL: EVIL},
        "scores": score(rows), "before": score_before(rows), "lineage": {"code": EVIL}, "notes": [EVIL],
        "examples": [Example(answer=row, samples=noise) for row in rows],
    }  # fmt: skip
    return ReportData(**(known | fields))


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = write_report(data())
    outline = Outline(html)
    assert outline.open == []
    names = [tag for tag, _ in outline.tags]
    assert names.count("audio") == names.count("image") == 9
    for anchor in ("results", "examples", "training", "curriculum", "origin"):
        assert f'id="{anchor}"' in html
        assert f'href="#{anchor}"' in html
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "iframe", "img")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", html)
    assert html == write_report(data())


def test_a_transcript_with_markup_stays_text() -> None:
    html = write_report(data())
    assert "<script" not in html
    assert "<img" not in html
    assert "alert('x')" in Outline(html).text


def test_the_clip_on_the_page_is_the_clip() -> None:
    samples = np.linspace(-0.5, 0.5, 8000).astype(np.float32)
    html = write_report(data(examples=[Example(answer=answers()[0], samples=samples)]))
    audio = re.search(r"data:audio/flac;base64,([^\"]+)", html)
    assert audio is not None
    decoded, rate = sf.read(io.BytesIO(base64.b64decode(audio[1])), dtype="float32")
    assert rate == 16000
    assert np.abs(decoded - samples).max() <= 2**-15


def test_a_run_without_anything_has_a_page() -> None:
    html = write_report(ReportData(model="m", architecture="a"))
    assert Outline(html).open == []
    assert "was not evaluated" in html
    assert "<svg" not in html


def test_numbers_that_are_none_do_not_break_the_page() -> None:
    rows = [{"stage": "a", "step": 1, "loss": float("nan"), "lr": None, "tasks": {}}, {"stage": "a", "step": 2}]
    silent = Hypothesis(key="k", task="asr", split="test", reference="", hypothesis="")
    html = write_report(data(metrics=rows, scores=score([silent]), before=None, examples=[Example(answer=silent)]))
    assert Outline(html).open == []
    assert "nan" not in Outline(html).text


def test_the_sentence_and_the_warnings_say_what_matters() -> None:
    rows = answers()[:-1]
    scores, before = score(rows), score_before(rows)
    assert lead(scores, before).startswith("On 5 test clips the word error rate of asr is ")
    assert "before training it was 100.0\u202f%" in lead(scores, before)
    said = " ".join(warnings(scores, before))
    assert "no better than always answering “anger” (66.7\u202f%)" in said
    assert "accuracy is worse than before training (66.7\u202f% → 33.3\u202f%)" in said
    assert "only 5 test clips" in said


def test_examples_span_best_to_worst_of_every_task() -> None:
    rows = answers()[:-1]
    chosen = choose(rows, 4)
    assert [row.task for row in chosen] == ["asr", "asr", "label:emotion", "label:emotion"]
    assert [error_of(row) for row in chosen] == [0.0, 0.75, 0.0, 1.0]
    assert len(choose(rows, 100)) == len(rows)
    assert choose(rows[::-1], 4) != []
    assert choose(rows, 4) == chosen
