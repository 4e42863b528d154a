"""What a clip's samples say about its recording: loudness, peak, clipping, noise, bandwidth and silence.

Everything but peak and clipping comes from one spectrogram: frames of 40 ms, every 20 ms, under a sine window, whose
squares add up to one, so that the powers of the frames add up to the power of the clip.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from components.audio.segments import FRAME, frame_powers, long_runs, pauses
from components.schema import SAMPLE_RATE

HOP = 320  # samples
WINDOW = 2 * HOP
BLOCK = 128  # frames transformed at a time, so that they stay in the cache
BINS = 5  # of a band
BANDS = WINDOW // 2 // BINS
BAND_HERTZ = BINS * SAMPLE_RATE / WINDOW  # 125

# Both stages of the K-weighting at 48 kHz, ITU-R BS.1770-4, tables 1 and 2: numerator, denominator.
K_STAGES = (
    ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
    ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
)
K_OFFSET = -0.691  # LUFS, so that 997 Hz weigh nothing
ABSOLUTE_GATE, RELATIVE_GATE = -70.0, -10.0  # LUFS, LU
SECTION = 5  # hops: a gating block of 400 ms begins every 100 ms
SECTIONS = 4  # of a block

FLAT = 0.9999  # of the largest value: what stands above it in FLAT_RUN samples in a row is a flat top
FLAT_RUN = 3
FLAT_LEAST = 0.1  # largest value below which nothing is called clipped, as in components.audio.decode
PILE_BINS = 64  # of the upper half of the values
PILE_WIDTH, PILE_BELOW, PILE_GAP = 4, 12, 1  # bins: of a pile, of what it is held against, and between the two
PILE_RATIO, PILE_LEAST = 4.0, 20  # times as many samples as there, and no fewer than

DIGITAL = 1e-9  # power of a frame below which it is digital silence: -90 dBFS
LEAST_FRAMES = 10  # above it
QUIET, NOISY = 0.1, 0.95  # of a band's frames in ascending order: those with noise alone, those with sound
NOISE_BIAS = 10**0.373  # mean power of steady noise in a band against its QUIET quantile, as measured
LEAST_NOISE = 2.0**-30 / 12  # power of rounding to 16 bits
LEAST_SNR = -20.0  # dB
RISE = 7.0  # NOISY against QUIET power of a band in which there is more than steady noise, as a ratio
STOP_BAND = 1e-6  # of the strongest band: what a resampler leaves where there was nothing
STEADY = 0.25  # share of the bands above the stop band that rise, below which the sound itself is steady


class Quality(NamedTuple):
    """Measures of one clip; those that it does not allow are -inf or NaN."""

    loudness: float  # LUFS, gated; -inf for silence
    peak: float  # dBFS of the largest sample; -inf for digital silence
    clipped: float  # share of the samples in flat tops of the wave
    snr: float  # dB, an estimate, of a steady sound -20; NaN for silence and for clips under 0.2 s
    bandwidth: float  # hertz up to which there is sound; NaN for silence
    silence: float  # share of the time in pauses of 0.2 s or more


def measure(samples: np.ndarray) -> Quality:
    """Measures of mono samples (samples,) float32 at SAMPLE_RATE.

    Raises ValueError if the samples are not one row of finite numbers, or none.
    """
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"samples must be mono, shape (samples,), not {samples.shape}; mix the channels first")
    samples = np.ascontiguousarray(samples, np.float32)
    low, high = float(samples.min()), float(samples.max())
    if not np.isfinite(high - low):
        raise ValueError("samples hold NaN or infinite values; pass them through components.audio.decode first")
    peak = max(high, -low)
    weighted, bands = _spectra(samples)
    ordered = _ordered(bands)
    return Quality(
        loudness=_loudness(weighted, len(samples)),
        peak=_decibels(peak * peak),
        clipped=_clipped(samples, low, high),
        snr=_snr(ordered),
        bandwidth=_bandwidth(ordered),
        silence=float(pauses(frame_powers(samples)).mean()) if len(samples) >= FRAME else 0.0,
    )


def _decibels(power: float) -> float:
    return 10 * float(np.log10(power)) if power > 0 else -np.inf


def _k_weights() -> np.ndarray:
    """(bins,) float64 power response of the K-weighting: that of the standard's filters at the bins' frequencies."""
    delay = np.exp(-2j * np.pi * np.arange(WINDOW // 2 + 1) * SAMPLE_RATE / WINDOW / 48_000)
    response = np.ones(len(delay), np.complex128)
    for numerator, denominator in K_STAGES:
        response *= np.polyval(numerator[::-1], delay) / np.polyval(denominator[::-1], delay)
    powers: np.ndarray = np.square(np.abs(response))
    return powers


SINE = np.sin(np.pi * (np.arange(WINDOW) + 0.5) / WINDOW).astype(np.float32)
SIDES = np.r_[1.0, np.full(WINDOW // 2 - 1, 2.0), 1.0] / (WINDOW * HOP)  # from |X|² to power
ONE_SIDED = SIDES.astype(np.float32)
K_WEIGHTS = _k_weights().astype(np.float32)


def _spectra(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """K-weighted power (frames,) and power in bands (frames, BANDS) of the frames whose middles are 0, HOP, 2 HOP …"""
    count = -(-len(samples) // HOP) + 1
    padded = np.zeros((count + 1) * HOP, np.float32)
    padded[HOP : HOP + len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    weighted, bands = np.empty(count, np.float32), np.empty((count, BANDS), np.float32)
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        spectra = np.fft.rfft(frames[part] * SINE, axis=1)
        power = (np.square(spectra.real) + np.square(spectra.imag)) * ONE_SIDED
        weighted[part] = np.einsum("fb,b->f", power, K_WEIGHTS)  # not a matrix product: its sums depend on threads
        bands[part] = sum(power[:, 1 + offset :: BINS] for offset in range(BINS))
    return weighted, bands


def _loudness(weighted: np.ndarray, samples: int) -> float:
    """Integrated loudness after ITU-R BS.1770-4; a clip without a whole block is one block."""
    count = samples // (SECTION * HOP)
    powers = weighted.astype(np.float64)
    if count < SECTIONS:
        blocks = powers.sum(keepdims=True) * HOP / samples
    else:
        last, rest = divmod(samples, HOP)
        powers[0] *= 2  # half of the first frame lies before the clip, and some of the last behind it
        powers[last] /= 0.5 + float(np.square(SINE[HOP : HOP + rest], dtype=np.float64).sum()) / HOP
        hops = (powers[:-1] + powers[1:]) / 2
        sections = hops[: count * SECTION].reshape(count, SECTION).mean(axis=1)
        starts = count - SECTIONS + 1
        blocks = sum(sections[offset : offset + starts] for offset in range(SECTIONS)) / SECTIONS
    gate = 10 ** ((ABSOLUTE_GATE - K_OFFSET) / 10)
    blocks = blocks[blocks > gate]
    if not len(blocks):
        return -np.inf
    gate = max(gate, blocks.mean() * 10 ** (RELATIVE_GATE / 10))
    return K_OFFSET + _decibels(float(blocks[blocks > gate].mean()))


def _clipped(samples: np.ndarray, low: float, high: float) -> float:
    """Share of the samples in flat tops, on both sides."""
    count = 0
    for rail, side in ((high, samples), (-low, -samples)):
        if rail >= FLAT_LEAST:
            level = min(FLAT * rail, _pile(side, rail))
            count += int(np.count_nonzero(long_runs(side >= np.float32(level), FLAT_RUN)))
    return count / len(samples)


def _pile(side: np.ndarray, rail: float) -> float:
    """Level at which the values of (samples,) pile up; `rail`, their largest, where they do not.

    A change of rate after clipping makes the flat tops ripple and overshoot, but they stay near one level: a narrow
    stretch of values that occurs far more often than those below it, where a wave that was not clipped gets rarer.
    """
    top = side[side >= np.float32(rail / 2)].astype(np.float64)
    bins = np.minimum((top / rail * 2 - 1) * PILE_BINS, PILE_BINS - 1).astype(np.int64)
    sums = np.r_[0, np.cumsum(np.bincount(bins, minlength=PILE_BINS))]
    starts = np.arange(PILE_BELOW + PILE_GAP, PILE_BINS - PILE_WIDTH + 1)
    here = sums[starts + PILE_WIDTH] - sums[starts]
    below = sums[starts - PILE_GAP] - sums[starts - PILE_GAP - PILE_BELOW]
    piles = (here >= PILE_LEAST) & (here * PILE_BELOW > PILE_RATIO * PILE_WIDTH * below)
    if not piles.any():
        return rail
    return rail * float(0.5 + starts[np.where(piles, here, 0).argmax()] / (2 * PILE_BINS))


def _ordered(bands: np.ndarray) -> np.ndarray:
    """(BANDS, frames) float32: the powers of each band in ascending order, digital silence left out."""
    heard = bands[bands.sum(axis=1) > DIGITAL]
    return np.sort(np.ascontiguousarray(heard.T), axis=1)


def _snr(ordered: np.ndarray) -> float:
    """Power above the noise against the noise, which in each band is what its quietest frames hold.

    This is R. Martin's minimum statistics (IEEE Trans. Speech and Audio Processing, 2001) with one quantile for the
    whole clip in place of a minimum that is followed, so a steady sound is noise too. With noise added at 0 to 30 dB to
    38 clean clips its error was -2.0 to -0.4 dB on average in white noise and -0.6 to 1.8 dB in pink noise, with a
    deviation of at most 0.8 dB; in babble, which has pauses of its own, 4.8 dB at 0 dB and under 2 dB from 10 dB on.
    That of WADA-SNR (C. Kim and R. Stern, Interspeech 2008) was 1 dB there at 0 dB, and 3 to 13 dB from 20 dB on.
    """
    frames = ordered.shape[1]
    if frames < LEAST_FRAMES:
        return np.nan
    total = float(ordered.mean(axis=1, dtype=np.float64).sum())
    noise = NOISE_BIAS * float(ordered[:, int(QUIET * (frames - 1))].sum(dtype=np.float64))
    noise = max(noise, LEAST_NOISE)
    return max(LEAST_SNR, _decibels((total - noise) / noise))


def _bandwidth(ordered: np.ndarray) -> float:
    """Upper edge of the highest band that holds sound, as the one below it does.

    A band holds sound if it is louder than a stop band and rises above its steady noise; where hardly any band rises,
    as in rain or a held note, the steady sound is what was recorded, and all bands above the stop band count.
    """
    frames = ordered.shape[1]
    if not frames:
        return np.nan
    loud, quiet = ordered[:, int(NOISY * (frames - 1))], ordered[:, int(QUIET * (frames - 1))]
    present = loud > STOP_BAND * loud.max()
    rising = present & (loud > RISE * quiet)
    if np.count_nonzero(rising) >= STEADY * np.count_nonzero(present):
        present = rising
    held = np.flatnonzero(present[1:] & present[:-1])
    return float((held[-1] + 2.0 if len(held) else 1.0) * BAND_HERTZ)
