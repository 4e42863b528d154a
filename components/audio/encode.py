"""From samples to the bytes that a shard keeps: 16-bit mono FLAC, the same on every run, without dither."""

from __future__ import annotations

import io

import numpy as np
import soundfile as sf

from components.schema import SAMPLE_RATE


def to_int16(samples: np.ndarray) -> np.ndarray:
    """(samples,) float32 in [-1, 1] to int16, rounded to nearest and saturated; 16-bit sources come back exactly.

    Raises ValueError if the samples are not one row of finite numbers.
    """
    if samples.ndim != 1:
        raise ValueError(f"samples must be mono, shape (samples,), not {samples.shape}; mix the channels first")
    if not np.isfinite(samples.sum(dtype=np.float64)):
        raise ValueError("samples hold NaN or infinite values; pass them through components.audio.decode first")
    scaled = samples * np.float32(32768.0)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -32768.0, 32767.0, out=scaled)
    return scaled.astype(np.int16)


def to_flac(samples: np.ndarray) -> bytes:
    """FLAC of (samples,) float32 at 16 kHz (or of int16 as it is); the bytes depend on the samples and libFLAC only."""
    whole = samples if samples.dtype == np.int16 else to_int16(samples)
    buffer = io.BytesIO()
    sf.write(buffer, whole, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
