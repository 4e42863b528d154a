"""Where a long recording is cut: at pauses, so that its pieces tile it, or around the speech that a detector found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.audio.vad import Span
from components.schema import SAMPLE_RATE

FRAME = 160  # samples of one value of power: 10 ms
PAUSE = 0.2  # seconds from which on quiet counts as a pause and not as the closure of a consonant
PAUSE_FRAMES = 19  # whole frames that lie in any stretch of PAUSE seconds, wherever it begins
NEAR = 1 / 3  # of the longest piece before its end: where a pause is looked for first, so that pieces are not short

LOUD = 99.0  # percentile of the frames' levels that stands for the sound
FLOOR = 10.0  # percentile that stands for what is left in pauses
DEEPEST = 60.0  # dB below the sound at which the floor is taken to be at most, as digital silence has none
SHARE = 0.35  # of the way from floor to sound, in dB: a frame below it is quiet
LEAST_RANGE = 6.0  # dB between floor and sound under which nothing is called a pause
SILENT = -70.0  # dBFS: a recording that stays below it is one pause


def split_at_pauses(
    samples: np.ndarray, longest: float = 30.0, shortest: float | None = None, spans: Sequence[Span] | None = None
) -> list[tuple[int, int]]:
    """Pieces (first sample, one after the last) that tile (samples,) float32 at SAMPLE_RATE without gap or overlap.

    A recording of at most `longest` seconds stays whole; else every piece has `shortest` (a sixth of `longest`) to
    `longest` seconds. Each cut lies in the middle of the quietest pause of PAUSE seconds or more in the last third of
    the piece, else in the whole of it from `shortest` on; where there is none, at the quietest place. A pause is what
    lies between the `spans` of speech (sorted or not), or without them what `pauses` finds by power.
    Raises ValueError if the samples are not one row, or the seconds cannot be kept.
    """
    _check_row(samples)
    least, most = _limits(longest, longest / 6 if shortest is None else shortest)
    powers = frame_powers(samples)
    silent = None if spans is None else _between(spans, len(powers))
    begin = 0
    pieces: list[tuple[int, int]] = []
    while len(samples) - begin > most:
        first, last = begin + least, min(begin + most, len(samples) - least)
        cut = _cut(powers, silent, begin, first, last, last - int(NEAR * most))
        pieces.append((begin, cut))
        begin = cut
    return [*pieces, (begin, len(samples))] if len(samples) else []


def segments_of(
    samples: np.ndarray, spans: Sequence[Span], longest: float = 30.0, join_gap: float = 0.5, pad: float = 0.1
) -> list[tuple[int, int]]:
    """Pieces of speech (first sample, one after the last), sorted and without overlap, of (samples,) at SAMPLE_RATE.

    Spans are joined over gaps of at most `join_gap` seconds, widened by `pad` seconds on both sides (by half the gap
    where two would meet), and cut as in `split_at_pauses` where they are longer than `longest`. What lies outside the
    recording is ignored. Raises ValueError if the samples are not one row, or the seconds cannot be kept.
    """
    _check_row(samples)
    most = _limits(longest, longest / 6)[1]
    if join_gap < 0 or pad < 0:
        raise ValueError(f"join_gap={join_gap:g} and pad={pad:g} must not be below 0 s")
    regions = _joined(spans, len(samples), round(join_gap * SAMPLE_RATE))
    margin = round(pad * SAMPLE_RATE)
    pieces: list[tuple[int, int]] = []
    for number, (begin, end) in enumerate(regions):
        before = regions[number - 1][1] if number else -begin  # half of the way to it is then the recording's start
        after = regions[number + 1][0] if number + 1 < len(regions) else 2 * len(samples) - end
        begin, end = begin - min(margin, (begin - before) // 2), end + min(margin, (after - end) // 2)
        if end - begin <= most:
            pieces.append((begin, end))
            continue
        within = [Span(start - begin / SAMPLE_RATE, stop - begin / SAMPLE_RATE) for start, stop in spans]
        parts = split_at_pauses(samples[begin:end], longest, spans=within)
        pieces += [(begin + first, begin + last) for first, last in parts]
    return pieces


def frame_powers(samples: np.ndarray) -> np.ndarray:
    """(frames,) float32 mean square of each FRAME samples; what is left at the end of (samples,) is not counted."""
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    powers: np.ndarray = np.einsum("fs,fs->f", frames, frames, dtype=np.float32) / np.float32(FRAME)
    return powers


def pauses(powers: np.ndarray) -> np.ndarray:
    """(frames,) bool: which frames of `frame_powers` lie in a pause of PAUSE seconds or more.

    A frame is quiet if it lies less than SHARE of the way, in dB, from the floor to the level of the sound.
    """
    if not len(powers):
        return np.zeros(0, bool)
    levels = 10 * np.log10(np.maximum(powers, 1e-12))
    floor, loud = np.percentile(levels, (FLOOR, LOUD))
    if loud < SILENT:
        return np.ones(len(powers), bool)
    floor = max(floor, loud - DEEPEST)
    if loud - floor < LEAST_RANGE:
        return np.zeros(len(powers), bool)
    return long_runs(levels < floor + SHARE * (loud - floor), PAUSE_FRAMES)


def long_runs(mask: np.ndarray, least: int) -> np.ndarray:
    """(frames,) bool: those true values of `mask` (frames,) that stand in a row of `least` or more."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    kept = ends - starts >= least
    steps = np.zeros(len(mask) + 1, np.int8)
    steps[starts[kept]], steps[ends[kept]] = 1, -1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _check_row(samples: np.ndarray) -> None:
    if samples.ndim != 1:
        raise ValueError(f"samples must be mono, shape (samples,), not {samples.shape}; mix the channels first")


def _limits(longest: float, shortest: float) -> tuple[int, int]:
    """Samples of the shortest and of the longest piece."""
    if not (longest >= 1.0 and 0.0 <= shortest <= longest / 2):
        raise ValueError(
            f"pieces of {shortest:g} to {longest:g} s cannot be cut: longest must be 1 s or more, shortest at most half"
        )
    return max(1, int(shortest * SAMPLE_RATE)), int(longest * SAMPLE_RATE)


def _between(spans: Sequence[Span], frames: int) -> np.ndarray:
    """(frames,) bool: frames whose middle lies in no span, in rows of PAUSE seconds or more."""
    middles = (np.arange(frames) + 0.5) * FRAME / SAMPLE_RATE
    steps = np.zeros(frames + 1, np.int64)
    for start, end in spans:
        first, last = np.searchsorted(middles, (start, max(start, end)))
        steps[first] += 1
        steps[last] -= 1
    return long_runs(np.cumsum(steps[:-1]) == 0, PAUSE_FRAMES)


def _cut(powers: np.ndarray, silent: np.ndarray | None, begin: int, first: int, last: int, near: int) -> int:
    """Sample in [first, last] at which the piece that starts at `begin` ends; one from `near` on is preferred."""
    low, high = -(-first // FRAME), last // FRAME
    if high - low < PAUSE_FRAMES:
        return last
    origin = begin // FRAME
    quiet = pauses(powers[origin:high])[low - origin :] if silent is None else silent[low:high]
    means = np.convolve(powers[low:high], np.full(PAUSE_FRAMES, 1 / PAUSE_FRAMES), mode="valid")
    whole = np.convolve(quiet, np.ones(PAUSE_FRAMES, np.int64), mode="valid") == PAUSE_FRAMES
    for start in (max(0, near // FRAME - low), 0):
        places = start + np.flatnonzero(whole[start:])
        if len(places):
            at = int(places[means[places].argmin()])
            loud = np.r_[-1, np.flatnonzero(~quiet), len(quiet)]
            after = int(np.searchsorted(loud, at))
            left, right = max(int(loud[after - 1]) + 1, start), int(loud[after])
            return (low + (left + right) // 2) * FRAME
    return (low + int(means.argmin()) + PAUSE_FRAMES // 2) * FRAME


def _joined(spans: Sequence[Span], samples: int, gap: int) -> list[tuple[int, int]]:
    """Spans as (first sample, one after the last) inside the recording, sorted, those at most `gap` apart made one."""
    regions: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        begin, stop = max(0, round(start * SAMPLE_RATE)), min(samples, round(end * SAMPLE_RATE))
        if stop <= begin:
            continue
        if regions and begin - regions[-1][1] <= gap:
            regions[-1] = (regions[-1][0], max(regions[-1][1], stop))
        else:
            regions.append((begin, stop))
    return regions
