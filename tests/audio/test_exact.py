"""components/audio/exact.py: dr_flac's samples are libFLAC's, and whatever is unusual is left to decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st

from components.audio.bounds import BadAudio
from components.audio.decode import decode
from components.audio.encode import to_flac, to_int16
from components.audio.exact import FULL, exact_samples
from components.audio.level import has_offset


def wave(seconds: float = 1.0, gain: float = 0.5) -> np.ndarray:
    time = np.arange(int(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(3).normal(0, 0.05, len(time))
    return (gain * np.sin(2 * np.pi * 220 * time) + noise).astype(np.float32)


def flac(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def test_samples_are_those_of_libflac() -> None:
    whole = to_int16(wave(3.7))
    found = exact_samples(to_flac(whole))
    assert found is not None and found[0].dtype == np.int16
    assert (found[0] == whole).all() and found[1] == ()


def test_real_recordings_are_the_same_by_both_decoders(shared_data: Path) -> None:
    compared = 0
    for file in sorted(shared_data.glob("*/audio/*.flac"))[::97]:
        found = exact_samples(file.read_bytes())
        if found is not None:
            samples, marks = decode(file.read_bytes(), file.name)
            assert (found[0] == to_int16(samples)).all() and found[1] == marks
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("extreme", [-32_768, 32_767])
def test_an_offset_is_summed_exactly(extreme: int) -> None:
    samples = np.full(200_000, extreme, np.int16)
    assert has_offset(samples, FULL)  # 32 bits hold 65,536 of them
    assert not has_offset(np.concatenate([samples, -1 - samples]), FULL)


@pytest.mark.parametrize(
    "data",
    [
        flac(wave(), rate=8_000),
        flac(wave(), subtype="PCM_24"),
        flac(np.stack([wave(), wave()], axis=1)),
        flac(wave(gain=0.01) + 0.3),
        b"fLaC" + bytes(60),
        b"",
    ],
    ids=["rate", "bits", "stereo", "offset", "header", "empty"],
)
def test_what_does_not_fit_or_needs_a_note_is_left_to_decode(data: bytes) -> None:
    assert exact_samples(data) is None


@pytest.mark.parametrize(
    ("samples", "marks"),
    [(wave() * 0.0, ("silent",)), (np.clip(wave(gain=3.0), -0.9, 0.9), ("clipped",)), (wave(), ())],
)
def test_what_is_noted_is_what_decode_notes(samples: np.ndarray, marks: tuple[str, ...]) -> None:
    found = exact_samples(flac(samples))
    assert found is not None and found[1] == marks == decode(flac(samples), "a.flac").marks


WHOLE = to_flac(to_int16(wave(1.5)))


@given(st.integers(42, len(WHOLE) - 1), st.integers(0, 7))
def test_damage_is_never_taken_for_audio(place: int, bit: int) -> None:
    """A flipped bit of a frame is left to libFLAC, unless the samples are what they were."""
    data = bytearray(WHOLE)
    data[place] ^= 1 << bit
    found = exact_samples(bytes(data))
    assert found is None or (found[0] == to_int16(wave(1.5))).all()


@given(st.integers(0, len(WHOLE) - 1))
def test_a_cut_file_is_left_to_decode(length: int) -> None:
    assert exact_samples(WHOLE[:length]) is None
    with pytest.raises(BadAudio):
        decode(WHOLE[:length], "cut.flac")
