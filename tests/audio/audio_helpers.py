"""Made audio for the tests of components/audio."""

from __future__ import annotations

import io

import numpy as np
import soundfile as sf


def voice(seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    """A swelling 200 Hz tone with a little noise, peak near 0.3."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time))
    swell = 0.28 * np.sin(3 * time) ** 2
    return np.asarray(swell * np.sin(2 * np.pi * 200 * time) + 0.003 * noise, dtype=np.float32)


def written(samples: np.ndarray, rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()
