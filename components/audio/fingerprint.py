"""What a clip sounds like in a few dozen integers, so that a copy is known after a change of level, codec or cut.

After J. Haitsma and T. Kalker, "A Highly Robust Audio Fingerprinting System" (ISMIR 2002): the power of 33 bands from
300 Hz up, and for each pair of neighbours one bit, whether their difference grew from one frame to the next. Two things
differ. There is one hash in 93 ms and not in 11.6 ms, so that 10 s take 400 bytes of the index. And as frames so
far apart would no longer fall on the same places of a copy that was cut, the grid starts where the rhythm of the
clip itself says: at the phase of its loudness curve at the rate of the hashes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from components.schema import SAMPLE_RATE

VERSION = 1  # of the hashes: those of another version cannot be compared
DECIMATION = 4
RATE = SAMPLE_RATE // DECIMATION  # hertz at which the clip is looked at; telephone speech and all codecs keep this much
HOP = 372  # samples at RATE: 93 ms
HOP_SECONDS = HOP / RATE
WINDOW = 1480  # samples at RATE: 0.37 s, as in the paper
TRANSFORM = 2048
BITS = 32
BAND_HERTZ = (300.0, 1700.0)
SILENCE = 3e-4  # peak below which a clip has no fingerprint: -70 dB
QUIET = 1e-4  # of the loudest frame's power: a frame below it is noise, and its hash is 0, which matches nothing
STEP = 8  # samples at RATE for one value of the loudness curve
BLOCK = 64  # frames transformed at a time, so that they stay in the cache
SECTION = 1 << 15  # samples halved at a time, for the same reason

# Half-band filter (-1, 0, 9, 16, 9, 0, -1) / 32: flat to a quarter of the new rate, 30 dB down above the rest.
HALF_BAND = ((0, -1 / 32), (2, 9 / 32), (3, 16 / 32), (4, 9 / 32), (6, -1 / 32))

LEAST_OVERLAP = 8  # hashes that must lie on each other: about 1.1 s of sound; shorter clips are never called alike
LEAST_SHARE = 0.5  # of the hashes of the shorter clip


class Match(NamedTuple):
    """How two fingerprints agree at their best alignment."""

    similarity: float  # share of equal bits: about 0.5 for unrelated clips, 1 for the same; 0 where nothing overlaps
    overlap: int  # hashes compared
    shift: int  # hash n of the second lies on hash n + shift of the first


def fingerprint(samples: np.ndarray) -> np.ndarray:
    """Hashes (hashes,) uint32 of mono samples (samples,) float32 at SAMPLE_RATE, one in HOP_SECONDS.

    0 stands for a frame in which nothing is heard. Empty for silence and for clips under about half a second.
    Raises ValueError if the samples are not one row.
    """
    if samples.ndim != 1:
        raise ValueError(f"samples must be mono, shape (samples,), not {samples.shape}; mix the channels first")
    if len(samples) < DECIMATION * (WINDOW + HOP) or max(float(samples.max()), -float(samples.min())) < SILENCE:
        return np.zeros(0, np.uint32)
    low = _halve(_halve(samples.astype(np.float32, copy=False)))
    low = low[_grid_start(low) :]
    count = (len(low) - WINDOW) // HOP + 1
    if count < 2:
        return np.zeros(0, np.uint32)
    bands = _band_powers(low, count)
    steps = bands[:, :-1] - bands[:, 1:]
    bits = steps[1:] > steps[:-1]
    hashes = np.packbits(bits, axis=1, bitorder="little").view("<u4").ravel().astype(np.uint32)
    power = bands.sum(axis=1)
    hashes[np.minimum(power[1:], power[:-1]) <= QUIET * power.max()] = 0
    return hashes


def _halve(samples: np.ndarray) -> np.ndarray:
    """(samples,) at half the rate."""
    count = (len(samples) + 1) // 2
    padded = np.pad(samples, (3, 4))
    halved = np.zeros(count, np.float32)
    for start in range(0, count, SECTION):
        part = halved[start : start + SECTION]
        for at, weight in HALF_BAND:
            first = 2 * start + at
            part += np.float32(weight) * padded[first : first + 2 * len(part) - 1 : 2]
    return halved


def _grid_start(low: np.ndarray) -> int:
    """Where in the first hop the grid starts: the phase of the loudness curve at one turn a hop.

    The taper keeps what lies at the ends, and is cut off first, from turning it.
    """
    count = len(low) // STEP
    loudness = np.sqrt(np.square(low[: count * STEP]).reshape(count, STEP).sum(axis=1)).astype(np.float64)
    loudness = (loudness - loudness.mean()) * np.hanning(count)
    turn = 2 * np.pi * STEP / HOP * np.arange(count)
    phase = float(np.arctan2(loudness @ np.sin(turn), loudness @ np.cos(turn)))
    return round(phase / (2 * np.pi) * HOP) % HOP


def _band_powers(low: np.ndarray, count: int) -> np.ndarray:
    """(count, BITS + 1) float32 power of the first `count` frames in bands that are equally wide on a log scale."""
    edges = np.rint(np.geomspace(*BAND_HERTZ, BITS + 2) * TRANSFORM / RATE).astype(np.int64)
    frames = np.lib.stride_tricks.sliding_window_view(low, WINDOW)[::HOP][:count]
    window = np.hanning(WINDOW).astype(np.float32)
    powers = np.empty((count, BITS + 1), np.float32)
    for start in range(0, count, BLOCK):
        spectra = np.fft.rfft(frames[start : start + BLOCK] * window, TRANSFORM, axis=1)[:, : edges[-1]]
        squares = np.square(spectra.real) + np.square(spectra.imag)
        powers[start : start + BLOCK] = np.add.reduceat(squares, edges[:-1], axis=1)
    return powers


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Share of equal bits of two fingerprints at their best alignment; 0 where too little overlaps, as in `match`."""
    return match(a, b).similarity


def match(a: np.ndarray, b: np.ndarray) -> Match:
    """Compare (hashes,) uint32 with (hashes,) uint32 at every alignment, and take the best.

    An alignment counts if LEAST_OVERLAP hashes that are not 0 meet, and LEAST_SHARE of the shorter clip's. All of them
    are one correlation of the bits as -1 and 1, so that two clips of an hour take a quarter of a second.
    """
    heard = min(int(np.count_nonzero(a)), int(np.count_nonzero(b)))
    least = max(LEAST_OVERLAP, int(np.ceil(LEAST_SHARE * heard)))
    if heard < LEAST_OVERLAP:
        return Match(0.0, 0, 0)
    size = 1 << (len(a) + len(b) - 2).bit_length()
    spectrum_a, spectrum_b = (np.fft.rfft(_signs(hashes), size, axis=0) for hashes in (a, b))
    products = spectrum_a * spectrum_b.conj()
    both = np.fft.irfft(np.stack([products[:, :BITS].sum(axis=1), products[:, BITS]]), size, axis=1)
    agreement, overlap = np.rint(both)
    shares = np.where(overlap >= least, 0.5 + 0.5 * agreement / np.maximum(overlap, 1) / BITS, 0.0)
    at = int(shares.argmax())
    return Match(float(shares[at]), int(overlap[at]) if shares[at] else 0, at if at < len(a) else at - size)


def alike(found: Match) -> bool:
    """Whether a match says that both are the same recording: the fewer hashes, the more of the bits must agree.

    Measured on the real recordings of tests/audio/test_fingerprint.py: unrelated clips stay 0.05 and more below, copies
    through mp3, Opus, 8 kHz, cuts and noise at 20 dB 0.03 and more above.
    """
    return found.similarity >= threshold(found.overlap)


def threshold(overlap: int) -> float:
    """Similarity from which on `overlap` hashes are the same recording."""
    return 0.68 + 0.9 / max(overlap, LEAST_OVERLAP)


def _signs(hashes: np.ndarray) -> np.ndarray:
    """(hashes, BITS + 1): the bits as -1 and 1, then 1; all 0 where the hash is 0."""
    bits = np.unpackbits(hashes.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    signs = np.ones((len(hashes), BITS + 1))
    signs[:, :BITS] = bits * 2.0 - 1.0
    signs[hashes == 0] = 0.0
    return signs
