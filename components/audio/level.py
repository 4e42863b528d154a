"""From decoded values to one channel within [-1, 1], with a note of whatever was mended.

`inside` says which frames are judged: the crop. What lies around it only serves the resampler, and is treated alike.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from components.audio.bounds import BadAudio

Channels = Literal["mean", "loudest", "first"]
SILENT, CLIPPED = "silent", "clipped"
ONLY_NOTED = frozenset({SILENT, CLIPPED})  # marks of samples that are as they were

OFFSET = 0.01  # mean of the samples above which it is taken off, if it is also OFFSET_SHARE of what is left
OFFSET_SHARE = 0.2
SILENCE = 3e-4  # peak below which a clip counts as silent: -70 dB
CANCELS = 0.1  # power left by the mean of the channels, against what unrelated channels would leave
MAX_NON_FINITE = 0.05  # share of NaN and infinite samples above which nothing is left to mend
RUNS = 8  # neighbours at the extreme value, below which it is a loud moment
GLITCH = 1000.0  # peak against the loudest thousandth, above which scaling would leave only silence


def finite(values: np.ndarray, inside: slice, marks: list[str]) -> np.ndarray:
    """(frames, channels) with NaN and infinities set to 0; BadAudio if they are too many."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return values
    bad = ~np.isfinite(values)
    count = int(bad[inside].sum())
    if count > MAX_NON_FINITE * bad[inside].size:
        share = 100 * count / bad[inside].size
        raise BadAudio(f"{share:.0f} % of the samples are not numbers (NaN or infinite); export it again")
    values[bad] = 0.0
    if count:
        marks.append(f"{count} non-finite samples set to 0")
    return values


def mono(values: np.ndarray, inside: slice, channels: Channels, marks: list[str]) -> np.ndarray:
    """(frames, channels) to (frames,): the mean, or the loudest channel where the mean would cancel.

    With "loudest" always the channel of most power, with "first" always the first.
    """
    frames, count = values.shape
    if count == 1:
        return values[:, 0]
    if channels == "first":
        marks.append(f"kept the first of {count} channels")
        return np.ascontiguousarray(values[:, 0])
    lanes = [np.ascontiguousarray(values[:, channel]) for channel in range(count)]
    powers = [_power(lane[inside]) for lane in lanes]
    loudest = int(np.argmax(powers))
    if channels == "loudest":
        marks.append(f"kept channel {loudest + 1} of {count}, the loudest")
        return lanes[loudest]
    mixed = np.zeros(frames, dtype=np.float32)
    for lane in lanes:
        mixed += lane
    mixed /= np.float32(count)
    if _power(mixed[inside]) < CANCELS * sum(powers) / count**2:
        marks.append(f"channels in opposite phase: kept channel {loudest + 1}")
        return lanes[loudest]
    marks.append(f"downmixed from {count} channels")
    return mixed


def _power(samples: np.ndarray) -> float:
    """Variance, at the speed of a dot product; infinite for samples beyond all measure."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(samples.mean(dtype=np.float64))
        return float(np.dot(samples, samples)) / len(samples) - mean**2


def level(samples: np.ndarray, inside: slice, marks: list[str]) -> np.ndarray:
    """Offset, clipping, loudness and silence, in this order; (frames,) in and out."""
    crop = samples[inside]
    low, high = float(crop.min()), float(crop.max())
    clipped = stands_at(crop, high) or stands_at(crop, low)
    if has_offset(crop):
        mean = float(crop.mean(dtype=np.float64))
        samples = samples - np.float32(mean)
        marks.append("constant offset removed")
        low, high = low - mean, high - mean
    peak = max(high, -low)
    if peak < SILENCE:
        marks.append(SILENT)
        return samples
    if clipped:
        marks.append(CLIPPED)
    if peak > 1.0:
        if peak > 2.0 and peak > GLITCH * float(np.percentile(np.abs(samples[inside]), 99.9)):
            raise BadAudio(f"single samples reach {peak:.3g} where the rest is near 0; export it again")
        samples = samples / np.float32(peak)
        if peak > 1.01:  # lossy codecs overshoot by that much in half of all loud files
            marks.append(f"scaled down from peak {peak:.{1 if peak >= 10 else 2}f}")
    return samples


def has_offset(samples: np.ndarray, full: float = 1.0) -> bool:
    """Whether the mean of `(samples,)` within ±`full` is far from 0, also against what varies around it."""
    mean = abs(_sum(samples)) / len(samples)
    return mean > OFFSET * full and mean > OFFSET_SHARE * float(samples.std(dtype=np.float64))


def _sum(samples: np.ndarray) -> float:
    """Exact for int16: 2^16 of them fit into 32 bits, which are added in half the time of 64."""
    if samples.dtype != np.int16:
        return float(samples.sum(dtype=np.float64))
    starts = range(0, len(samples), 1 << 16)
    return float(sum(int(samples[start : start + (1 << 16)].sum(dtype=np.int32)) for start in starts))


def stands_at(samples: np.ndarray, rail: float, full: float = 1.0) -> bool:
    """Whether the wave, `(samples,)` within ±`full`, stands at its extreme value again and again: it was clipped."""
    if abs(rail) < 0.1 * full:
        return False
    limit = samples.dtype.type(rail * 0.9999)
    beyond = samples >= limit if rail > 0 else samples <= limit
    if np.count_nonzero(beyond) <= RUNS:
        return False
    runs = int(np.count_nonzero(beyond[1:] & beyond[:-1]))
    return runs >= RUNS and runs * 2000 >= len(samples)
