"""Spectrogram and charts: what is where in the picture, and that odd values do not break it."""

from __future__ import annotations

import io
import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest

from components.evaluation import curves
from components.evaluation.plots import Band, Line, area_chart, line_chart, nice_ticks, number, smooth, thin
from components.evaluation.spectrogram import FLOOR, MELS, log_mel, mel_height, spectrogram_png


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 6000.0])
def test_a_tone_is_a_line_at_its_height(hertz: float) -> None:
    mel = log_mel(tone(hertz))
    assert mel.shape == (MELS, 98)
    assert mel.max() == 0
    assert mel.min() >= -FLOOR
    assert mel.mean(axis=1).argmax() == pytest.approx(mel_height(hertz) * MELS, abs=2)


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(3), np.zeros(16000), np.full(900, np.nan)])
def test_silence_and_nonsense_are_dark(samples: np.ndarray) -> None:
    assert log_mel(samples.astype(np.float32)).max() == -FLOOR


def test_the_png_is_valid_and_small() -> None:
    data = spectrogram_png(tone(440, 30))
    assert data == spectrogram_png(tone(440, 30))
    assert len(data) < 60_000
    stream, kinds = io.BytesIO(data[8:]), []
    while head := stream.read(8):
        length, kind = struct.unpack(">I4s", head)
        body = stream.read(length)
        assert zlib.crc32(kind + body) == struct.unpack(">I", stream.read(4))[0]
        kinds.append(kind)
        if kind == b"IHDR":
            assert struct.unpack(">II", body[:8]) == (900, MELS)
        if kind == b"IDAT":
            assert len(zlib.decompress(body)) == MELS * 901
    assert kinds == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]


def chart_of(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def test_ticks_cover_the_range_with_round_numbers() -> None:
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(1.3, 8.9) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(3, 3)[0] <= 3 <= nice_ticks(3, 3)[-1]
    assert [number(v) for v in (0, 1e-4, 0.25, 1234, 12000, 3e6)] == ["0", "1e\u22124", "0.25", "1234", "12k", "3M"]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_chart_breaks_at_what_is_no_number(log: bool) -> None:
    points = [(float(i), 10.0 ** (i % 3)) for i in range(10)]
    points[4] = (4.0, math.nan)
    html = line_chart([Line("loss", points)], title="T", x_label="step", y_label="loss", log=log)
    paths = list(chart_of(html).iter("path"))
    assert len(paths) == 2
    assert "nan" not in "".join(path.attrib["d"] for path in paths)


def test_charts_of_one_point_or_none_do_not_fail() -> None:
    chart_of(line_chart([Line("a", [(1.0, 0.0)])], title="T", x_label="x", y_label="y"))
    chart_of(area_chart([3.0], {"asr": [1.0]}, title="T", x_label="x"))
    assert "nothing was recorded" in line_chart([Line("a", [])], title="T", x_label="x", y_label="y")
    assert "nothing was recorded" in area_chart([], {}, title="T", x_label="x")


def test_shares_are_stacked_to_the_top_and_names_escaped() -> None:
    html = area_chart(
        [0, 1, 2], {"a<b": [1, 1, 2], "c": [1, 3, 0]}, title="<T>", x_label="x", bands=[Band(0, 2, "<s>")]
    )
    svg = chart_of(html)
    tops = [min(float(p.split(",")[1]) for p in area.attrib["points"].split()) for area in svg.iter("polygon")]
    assert tops == [26.0, 26.0]  # a fills the last column alone; c ends at the top everywhere
    assert "a<b" not in html
    assert "a&lt;b 50 %" in html


def test_thinning_and_smoothing_keep_the_level() -> None:
    points = [(float(i), 5.0 + (-1) ** i) for i in range(1000)]
    assert len(thin(points, 100)) == 100
    assert thin(points, 100)[3][1] == 5.0
    means = [y for _, y in smooth(points, 100)]
    assert max(abs(mean - 5) for mean in means[60:]) < 0.05
    assert means[0] == 6.0
    assert len(smooth([(0, math.nan), (1, 2.0)], 5)) == 1


def test_a_redone_step_counts_once_and_stages_are_laid_end_to_end() -> None:
    rows = [{"stage": "a", "step": step, "loss": 9.0} for step in (1, 2, 3, 2, 3, 4)]
    rows += [{"stage": "b", "step": 1, "loss": 1.0}, {"stage": "b", "step": 2, "loss": None}, {"no": "step"}]
    rows[3] = {"stage": "a", "step": 2, "loss": 7.0}
    first, second = curves.by_stage(rows)
    assert [loss for _, loss in curves.points(first, "loss")] == [9.0, 7.0, 9.0, 9.0]
    assert curves.points(second, "loss") == [(5.0, 1.0)]
    assert curves.bands([first, second])[1] == Band(4.0, 6.0, "b")
    counted_on = curves.by_stage([{"stage": "a", "step": 1}, {"stage": "b", "step": 2}])
    assert [stage.offset for stage in counted_on] == [0.0, 0.0]
