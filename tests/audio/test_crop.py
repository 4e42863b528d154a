"""A crop is the slice of the whole, decoded alone; what becomes of several channels can be chosen."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np
import pytest
from audio_helpers import voice, written
from hypothesis import given, settings
from hypothesis import strategies as st

from components.audio import decode as module
from components.audio.decode import BadAudio, decode


def stereo(left: np.ndarray, right: np.ndarray) -> bytes:
    return written(np.stack([left, right], axis=1))


def test_what_becomes_of_several_channels_can_be_chosen() -> None:
    pair = stereo(0.3 * voice(), -voice())
    for channels, kept, mark in (
        ("mean", -0.35 * voice(), "downmixed from 2 channels"),
        ("loudest", -voice(), "kept channel 2 of 2, the loudest"),
        ("first", 0.3 * voice(), "kept the first of 2 channels"),
    ):
        decoded = decode(pair, "x", channels)  # type: ignore[arg-type]
        assert np.abs(decoded.samples - kept).max() < 1e-4
        assert decoded.marks == (mark,)
        assert decode(written(voice()), "x", channels).marks == ()  # type: ignore[arg-type]


CROPPED = [
    *(("WAV", "PCM_16", rate) for rate in (8_000, 11_127, 16_000, 22_050, 44_100, 48_000, 192_000)),
    *(("FLAC", "PCM_16", 16_000), ("FLAC", "PCM_24", 44_100), ("AIFF", "PCM_16", 48_000), ("NIST", "PCM_16", 16_000)),
    *(("OGG", "VORBIS", 44_100), ("OGG", "OPUS", 48_000), ("MP3", None, 44_100), ("MP3", None, 16_000)),
]


@pytest.mark.parametrize(("form", "subtype", "rate"), CROPPED)
def test_a_crop_is_the_slice_of_the_whole(form: str, subtype: str | None, rate: int) -> None:
    data = written(voice(3.0, rate), rate, form, subtype)
    whole = decode(data, "x").samples
    for start, duration in ((0.0, 1.0), (0.7, 0.9), (1.23457, 1.0), (2.5, None), (0.0, 3.0), (2.0, 1.03)):
        crop = decode(data, "x", "mean", start, duration).samples
        end = len(whole) if duration is None else round((start + duration) * 16_000)
        expected = whole[round(start * 16_000) : end]
        assert abs(len(crop) - len(expected)) <= 1
        count = min(len(crop), len(expected))
        assert np.abs(crop[:count] - expected[:count]).max() < (1e-3 if rate != 16_000 else 1e-7)


@given(st.floats(0.0, 1.9), st.floats(0.05, 1.0), st.sampled_from([8_000, 11_127, 44_100]))
@settings(max_examples=25, deadline=None)
def test_any_crop_has_its_length_and_place(start: float, duration: float, rate: int) -> None:
    samples, whole = crop_and_whole(rate)
    crop = decode(samples, "x", "mean", start, duration).samples
    expected = whole[round(start * 16_000) : round((start + duration) * 16_000)]
    assert len(crop) == len(expected) == round((start + duration) * 16_000) - round(start * 16_000)
    assert np.abs(crop - expected).max() < 1e-3


@cache
def crop_and_whole(rate: int) -> tuple[bytes, np.ndarray]:
    data = written(voice(3.0, rate), rate)
    return data, decode(data, "x").samples


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_a_crop_of_a_long_file_does_not_decode_the_rest(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, frames = written(voice(60.0, 8_000), 8_000, form), []
    read = module._Forward.read
    monkeypatch.setattr(module._Forward, "read", lambda *args, **named: counted(read(*args, **named), frames))
    assert len(decode(data, "x", "mean", 57.0, 1.0).samples) == 16_000
    assert sum(frames) < 9_000


def counted(values: np.ndarray, frames: list[int]) -> np.ndarray:
    frames.append(len(values))
    return values


def test_a_file_of_two_hours_is_read_by_crops_only() -> None:
    form = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 28_800_036, b"WAVE", b"fmt ", 16, 1, 1, 4_000, 4_000, 1, 8)
    hours = form + struct.pack("<4sI", b"data", 28_800_000) + bytes(28_800_000)
    with pytest.raises(BadAudio, match="120 minutes are too many for one clip"):
        decode(hours, "x")
    assert len(decode(hours, "x", "mean", 6_000.0, 2.0).samples) == 32_000
    with pytest.raises(BadAudio, match="minutes are too many for one clip"):
        decode(hours, "x", "mean", 1_200.0)
    with pytest.raises(BadAudio, match="cannot last 3601 s"):
        decode(hours, "x", "mean", 0.0, 3_601.0)


BEHIND = [(1.5, 0.8, "ends at 2.30 s"), (4.0, 1.0, "ends at 5.00 s"), (2.5, None, "starts at 2.50 s")]
IMPOSSIBLE = [(-1.0, 1.0, "start at -1 s"), (0.0, 0.0, "last 0 s"), (float("nan"), None, "start at nan")]


@pytest.mark.parametrize("form", ["WAV", "OGG"])
def test_a_crop_behind_the_end_names_both_numbers(form: str) -> None:
    data = written(voice(2.0), form=form)
    for start, duration, said in BEHIND:
        with pytest.raises(BadAudio, match=f"the crop {said}, the recording at 2.00 s; correct") as caught:
            decode(data, "x", "mean", start, duration)
        assert caught.value.__notes__ == ["in x"]
    for start, duration, said in IMPOSSIBLE:
        with pytest.raises(BadAudio, match=f"a crop cannot {said}"):
            decode(data, "x", "mean", start, duration)
    with pytest.raises(BadAudio, match="less than 50 ms"):
        decode(data, "x", "mean", 1.0, 0.01)


def test_level_and_marks_are_those_of_the_crop() -> None:
    samples = np.concatenate([voice(), np.clip(9 * voice(), -1, 1), 0 * voice()])
    data = written(samples)
    assert decode(data, "x").marks == ("clipped",)
    assert [decode(data, "x", "mean", at, 1.0).marks for at in (0.0, 1.0, 2.0)] == [(), ("clipped",), ("silent",)]
    loud = written(np.concatenate([voice(), 4 * voice() / np.abs(voice()).max()]), subtype="FLOAT")
    assert np.abs(decode(loud, "x", "mean", 0.0, 1.0).samples - voice()).max() < 1e-6
