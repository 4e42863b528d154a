"""A stretch of a recording, at the rate of its file, with as much before and after it as the resampler looks at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import soxr

from components.audio.bounds import MAX_FILE_SECONDS, MAX_SECONDS, BadAudio, check_form, check_length
from components.schema import SAMPLE_RATE

CONTEXT = 0.05  # seconds; the filter of soxr HQ looks about 5 ms to each side
SLACK = 0.05  # seconds by which a crop may end behind the recording: manifests round


class Block(NamedTuple):
    """Some frames of a recording, as a decoder hands them on."""

    rate: int  # hertz
    at: int  # number of the first frame in the recording
    values: np.ndarray  # (frames, channels) float32


class Window(NamedTuple):
    """Frames of a file: the crop, and the crop with its context. None: to the end."""

    first: int
    begin: int
    end: int | None
    last: int | None


class Cut(NamedTuple):
    """What was read."""

    values: np.ndarray  # (frames, channels) float32, context included
    rate: int  # hertz
    inside: slice  # the frames of the crop in `values`
    window: Window


def check_crop(start: float, duration: float | None) -> None:
    """BadAudio unless a crop of these seconds can exist."""
    if not 0.0 <= start <= MAX_FILE_SECONDS:
        raise BadAudio(f"a crop cannot start at {start:g} s; it may start at 0 to {MAX_FILE_SECONDS:.0f} s")
    if duration is not None and not 0.0 < duration <= MAX_SECONDS:
        raise BadAudio(f"a crop cannot last {duration:g} s; it may last up to {MAX_SECONDS:.0f} s")


def window(start: float, duration: float | None, rate: int) -> Window:
    """Frames of a crop in a file of `rate` hertz.

    `first` lies on a frame that is also a sample of the whole recording at 16 kHz (every 441st at 44.1 kHz), so that
    the resampled crop falls on the samples of the resampled recording.
    """
    begin = round(start * rate)
    end = None if duration is None else round((start + duration) * rate)
    if rate == SAMPLE_RATE:
        return Window(begin, begin, end, end)
    context, step = math.ceil(CONTEXT * rate), rate // math.gcd(rate, SAMPLE_RATE)
    first = max(0, begin - context) // step * step
    return Window(first, begin, end, None if end is None else end + context)


def gather(blocks: Iterable[Block], start: float, duration: float | None) -> Cut:
    """The crop out of the blocks of a recording, which come in order; what lies outside is dropped as it comes.

    Raises BadAudio if the recording ends before the crop does, if it is too long, or if its form changes on the way.
    """
    parts: list[np.ndarray] = []
    place, rate, channels, heard = Window(0, 0, None, None), 0, 0, 0
    for block in blocks:
        if rate == 0:
            rate, channels = block.rate, block.values.shape[1]
            check_form(rate, channels)
            place = window(start, duration, rate)
            check_length((place.end or 0) - place.begin, rate, channels)
        elif (block.rate, block.values.shape[1]) != (rate, channels):
            change = f"{rate} Hz and {channels} channels to {block.rate} Hz and {block.values.shape[1]}"
            raise BadAudio(f"the audio changes from {change} on the way; cut it there, or convert it to WAV or FLAC")
        heard = block.at + len(block.values)
        stop = None if place.last is None else max(0, place.last - block.at)
        parts.append(block.values[max(0, place.first - block.at) : stop])
        if place.end is None:
            check_length(heard - place.begin, rate, channels)
        if place.last is not None and heard >= place.last:
            break
    if not parts:
        raise BadAudio("the file has a header but holds no audio; record or export it again")
    if (place.end or 0) > heard + SLACK * rate or (start > 0 and place.begin >= heard):
        raise beyond(start, duration, heard / rate)
    parts = [part for part in parts if len(part)] or parts[:1]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    inside = slice(place.begin - place.first, None if place.end is None else place.end - place.first)
    return Cut(values, rate, inside, place)


def beyond(start: float, duration: float | None, seconds: float) -> BadAudio:
    """The error of a crop that the recording, which lasts `seconds`, does not hold."""
    crop = f"starts at {start:.2f} s" if duration is None else f"ends at {start + duration:.2f} s"
    return BadAudio(f"the crop {crop}, the recording at {seconds:.2f} s; correct start and duration in the manifest")


def resample(samples: np.ndarray, cut: Cut, start: float, duration: float | None) -> np.ndarray:
    """`(samples,)` of a cut, context included, at 16 kHz without its context (soxr HQ)."""
    if cut.rate == SAMPLE_RATE:
        return samples[cut.inside]
    samples = soxr.resample(samples, cut.rate, SAMPLE_RATE, quality="HQ")
    skipped = cut.window.first * SAMPLE_RATE // cut.rate
    end = None if duration is None else round((start + duration) * SAMPLE_RATE) - skipped
    samples = samples[round(start * SAMPLE_RATE) - skipped : end]
    np.clip(samples, -1.0, 1.0, out=samples)  # the filter overshoots at hard edges
    return samples
