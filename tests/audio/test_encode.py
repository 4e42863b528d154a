"""FLAC of a clip: 16 bit, mono, 16 kHz, the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile as sf

from components.audio.encode import to_flac, to_int16

SAMPLES = (0.4 * np.sin(np.arange(16_000) * 0.07)).astype(np.float32)


def test_flac_is_16_bit_mono_16_khz_and_the_same_twice() -> None:
    data = to_flac(SAMPLES)
    info = sf.info(io.BytesIO(data))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16_000)
    assert info.frames == 16_000
    assert data == to_flac(SAMPLES.copy()) == to_flac(to_int16(SAMPLES))


def test_rounding_and_saturation() -> None:
    values = np.array([0.0, 1.0, -1.0, 1.5, -1.5, 0.5 / 32768, 1.5 / 32768, -0.6 / 32768], dtype=np.float32)
    assert to_int16(values).tolist() == [0, 32767, -32768, 32767, -32768, 0, 2, -1]
    assert values[1] == 1.0  # the caller's samples are left alone


def test_the_error_of_16_bits_is_half_a_step() -> None:
    back, _ = sf.read(io.BytesIO(to_flac(SAMPLES)), dtype="float32")
    assert np.abs(back - SAMPLES).max() <= 0.5 / 32768 + 1e-9


def test_samples_that_no_file_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="must be mono"):
        to_flac(np.zeros((10, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="NaN"):
        to_flac(np.array([0.0, np.nan], dtype=np.float32))
