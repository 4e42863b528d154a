"""From the bytes of an audio file, good or bad, to mono float32 at 16 kHz, with a note of whatever was mended."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile as sf

from components.audio.bounds import BLOCK, MAX_FILE_SECONDS, MIN_SECONDS, BadAudio, check_form, check_length, too_short
from components.audio.crop import Block, Cut, beyond, check_crop, gather, resample, window
from components.audio.level import Channels, finite, level, mono
from components.audio.sniff import AGAIN, CONVERT, declares_nonsense, demuxer, ogg_is_cut, refusal

__all__ = ["BadAudio", "Channels", "Decoded", "decode"]

UNKNOWN = 1 << 62  # libsndfile's frame count for a stream whose header does not say

CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "NIST"}
SEEKABLE = CONTAINERS - {"OGG", "MP3"}  # those go to the very sample; in the others the decoder has to warm up
SUBTYPES = {
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    *("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"),
}


class Decoded(NamedTuple):
    """One decoded recording."""

    samples: np.ndarray  # (samples,) float32 in [-1, 1], mono, SAMPLE_RATE
    marks: tuple[str, ...]  # what was noticed or mended, in the order of the work


def decode(
    data: bytes, name: str, channels: Channels = "mean", start: float = 0.0, duration: float | None = None
) -> Decoded:
    """Decode by content, whatever the name says: what libsndfile reads, and MP4, WebM, AAC, WMA, AMR and CAF.

    Several channels become their mean, the loudest or the first. NaN and infinities become 0, a constant offset is
    taken off, samples outside [-1, 1] are scaled down as a whole, and the rate becomes 16 kHz (soxr HQ).
    `start` and `duration`, in seconds of the file, cut a clip out of it before anything is measured or resampled; out
    of WAV, FLAC, AIFF, AU and NIST only that stretch is decoded, in other formats all that comes before it as well.
    Raises BadAudio for anything that cannot be trusted: a file that breaks off in the middle is refused, because its
    text would no longer belong to it.
    """
    try:
        return _decode(data, channels, start, duration)
    except BadAudio as error:
        error.add_note(f"in {name}")
        raise


def _decode(data: bytes, channels: Channels, start: float, duration: float | None) -> Decoded:
    reason = refusal(data)
    if reason:
        raise BadAudio(reason)
    check_crop(start, duration)
    cut = _read(data, start, duration)
    marks: list[str] = []
    if declares_nonsense(data):
        marks.append("header declares more audio than there is")
    if ogg_is_cut(data):
        marks.append("ends without an end mark: possibly cut off")
    samples = mono(finite(cut.values, cut.inside, marks), cut.inside, channels, marks)
    samples = resample(level(samples, cut.inside, marks), cut, start, duration)
    return Decoded(np.ascontiguousarray(samples, dtype=np.float32), tuple(marks))


def _read(data: bytes, start: float, duration: float | None) -> Cut:
    if demuxer(data):
        from components.audio.containers import container_blocks

        cut = gather(container_blocks(data), start, duration)
    else:
        cut = gather(_blocks(data, start, duration), start, duration)
    frames = len(cut.values[cut.inside])
    if frames < int(MIN_SECONDS * cut.rate):
        short = ogg_is_cut(data) and start == 0.0 and duration is None
        raise BadAudio(f"the audio breaks off at its start; {AGAIN}" if short else too_short(frames, cut.rate))
    return cut


class _Forward(sf.SoundFile):  # type: ignore[misc]
    """A sound file read from front to end: soundfile then does not seek after each block, which fails at a cut."""

    def seekable(self) -> bool:
        return False


def _blocks(data: bytes, start: float, duration: float | None) -> Iterator[Block]:
    """What libsndfile decodes, from the front or from shortly before the crop; one empty block if there is nothing."""
    try:
        with _Forward(io.BytesIO(data)) as file:
            declared, rate, channels = file.frames, file.samplerate, file.channels
            _check(file, whole=start == 0.0 and duration is None)
            place = window(start, duration, rate)
            at = place.first if file.format in SEEKABLE and declared < UNKNOWN else 0
            if at >= declared > 0:
                raise beyond(start, duration, declared / rate)
            if at:
                file.seek(at)
            size = min(BLOCK // channels, (place.last or declared) - at)
            yield Block(rate, at, np.zeros((0, channels), np.float32))
            while at < declared:
                values = file.read(size, dtype="float32", always_2d=True)
                yield Block(rate, at, values)
                at += len(values)
                if len(values) < size:
                    break
    except (sf.LibsndfileError, RuntimeError) as error:
        raise BadAudio(_decoder_says(str(error))) from error
    if declared < UNKNOWN and at < declared and (file.format != "MP3" or at < 0.99 * declared):
        raise BadAudio(f"the audio breaks off after {at / rate:.2f} s of {declared / rate:.2f} s; {AGAIN}")


def _check(file: sf.SoundFile, whole: bool) -> None:
    """What the header declares, before anything is allocated for it."""
    if file.format not in CONTAINERS or file.subtype not in SUBTYPES:
        raise BadAudio(f"{file.format} with {file.subtype} is not read here; {CONVERT}")
    check_form(file.samplerate, file.channels)
    if file.frames >= UNKNOWN:
        return
    if whole:
        check_length(file.frames, file.samplerate, file.channels)
    elif file.frames / file.samplerate > MAX_FILE_SECONDS:
        long = f"a file of {file.frames / file.samplerate / 3600:.0f} hours is too long to cut clips out of"
        raise BadAudio(f"{long}; split it into files of at most {MAX_FILE_SECONDS / 3600:.0f} hours")


def _decoder_says(message: str) -> str:
    message = message.split(": ", 1)[-1].removeprefix("Error : ").rstrip(".")
    if "lost sync" in message:
        return f"the audio data are damaged or cut off (the decoder lost its place); {AGAIN}"
    if "not recognised" in message or "does not exist" in message:
        return f"the format is not recognised as audio; {CONVERT}"
    return f"the decoder cannot read it ({message}); {AGAIN}, or {CONVERT}"
