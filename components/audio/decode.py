"""From the bytes of an audio file, good or bad, to mono float32 at 16 kHz, with a note of whatever was mended."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr

from components.audio.sniff import AGAIN, CONVERT, declares_nonsense, ogg_is_cut, refusal
from components.schema import SAMPLE_RATE

MIN_SECONDS = 0.05
MAX_SECONDS = 3600.0
MAX_CHANNELS = 32
RATES = range(4_000, 384_001)  # hertz
MAX_VALUES = 1 << 28  # samples times channels: 1 GiB as float32
UNKNOWN = 1 << 62  # libsndfile's frame count for a stream whose header does not say
BLOCK = 1 << 20  # values decoded at a time, so that a header that lies costs no memory

CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "NIST"}
SUBTYPES = {
    *("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
    *("VORBIS", "OPUS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"),
}

OFFSET = 0.01  # mean of the samples above which it is taken off, if it is also OFFSET_SHARE of what is left
OFFSET_SHARE = 0.2
SILENCE = 3e-4  # peak below which a clip counts as silent: -70 dB
CANCELS = 0.1  # power left by the mean of the channels, against what unrelated channels would leave
MAX_NON_FINITE = 0.05  # share of NaN and infinite samples above which nothing is left to mend
GLITCH = 1000.0  # peak against the loudest thousandth, above which scaling would leave only silence


class BadAudio(ValueError):
    """A file that is set aside; `reason` is one sentence that says what is wrong and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Decoded(NamedTuple):
    """One decoded recording."""

    samples: np.ndarray  # (samples,) float32 in [-1, 1], mono, SAMPLE_RATE
    marks: tuple[str, ...]  # what was noticed or mended, in the order of the work


def decode(data: bytes, name: str) -> Decoded:
    """Decode WAV, FLAC, Ogg Vorbis, Ogg Opus, MP3, AIFF, AU or NIST by content, whatever the name says.

    Channels are averaged, NaN and infinities become 0, a constant offset is taken off, samples outside [-1, 1] are
    scaled down as a whole, and the rate becomes 16 kHz (soxr HQ). Raises BadAudio for anything that cannot be trusted:
    a file that breaks off in the middle is refused, because its text would no longer belong to it.
    """
    try:
        return _decode(data)
    except BadAudio as error:
        error.add_note(f"in {name}")
        raise


def _decode(data: bytes) -> Decoded:
    reason = refusal(data)
    if reason:
        raise BadAudio(reason)
    values, rate = _read(data)
    marks: list[str] = []
    if declares_nonsense(data):
        marks.append("header declares more audio than there is")
    if ogg_is_cut(data):
        marks.append("ends without an end mark: possibly cut off")
    samples = _mono(_finite(values, marks), marks)
    samples = _level(samples, marks)
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
        np.clip(samples, -1.0, 1.0, out=samples)  # the filter overshoots at hard edges
    return Decoded(np.ascontiguousarray(samples, dtype=np.float32), tuple(marks))


class _Forward(sf.SoundFile):  # type: ignore[misc]
    """A sound file read from front to end: soundfile then does not seek after each block, which fails at a cut."""

    def seekable(self) -> bool:
        return False


def _read(data: bytes) -> tuple[np.ndarray, int]:
    """All values that the file really holds, (frames, channels) float32, and its rate in hertz."""
    blocks: list[np.ndarray] = []
    frames = 0
    try:
        with _Forward(io.BytesIO(data)) as file:
            declared, rate, channels = file.frames, file.samplerate, file.channels
            exact = file.format != "MP3"
            _check(file)
            size = min(declared, BLOCK // channels)
            while frames < declared:
                blocks.append(file.read(size, dtype="float32", always_2d=True))
                frames += len(blocks[-1])
                _check_length(frames, rate, channels)
                if len(blocks[-1]) < size:
                    break
    except (sf.LibsndfileError, RuntimeError) as error:
        raise BadAudio(_decoder_says(str(error))) from error
    if declared < UNKNOWN and frames < declared and (exact or frames < 0.99 * declared):
        raise BadAudio(f"the audio breaks off after {frames / rate:.2f} s of {declared / rate:.2f} s; {AGAIN}")
    if frames / rate < MIN_SECONDS:
        raise BadAudio(f"the audio breaks off at its start; {AGAIN}" if ogg_is_cut(data) else _too_short(frames, rate))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks), rate


def _check(file: sf.SoundFile) -> None:
    """What the header declares, before anything is allocated for it."""
    if file.format not in CONTAINERS or file.subtype not in SUBTYPES:
        raise BadAudio(f"{file.format} with {file.subtype} is not read here; {CONVERT}")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadAudio(f"{file.channels} channels, at most {MAX_CHANNELS} are read; mix it down first")
    rate = file.samplerate
    if rate not in RATES:
        raise BadAudio(f"a sample rate of {rate} Hz is outside {RATES[0]} to {RATES[-1]} Hz; resample it first")
    if file.frames < UNKNOWN:
        _check_length(file.frames, rate, file.channels)


def _check_length(frames: int, rate: int, channels: int) -> None:
    if frames / rate > MAX_SECONDS or frames * channels > MAX_VALUES:
        limit = min(MAX_SECONDS, MAX_VALUES / channels / rate) / 60
        much = f"{frames / rate / 60:.0f} minutes are too many for one clip"
        raise BadAudio(f"{much}; cut it into clips of at most {limit:.0f} minutes")


def _too_short(frames: int, rate: int) -> str:
    if frames == 0:
        return "the file has a header but holds no audio; record or export it again"
    lasts, least = 1000 * frames / rate, 1000 * MIN_SECONDS
    return f"it lasts {lasts:.1f} ms, less than {least:.0f} ms; leave it out or join it to its neighbour"


def _decoder_says(message: str) -> str:
    message = message.split(": ", 1)[-1].removeprefix("Error : ").rstrip(".")
    if "lost sync" in message:
        return f"the audio data are damaged or cut off (the decoder lost its place); {AGAIN}"
    if "not recognised" in message or "does not exist" in message:
        return f"the format is not recognised as audio; {CONVERT}"
    return f"the decoder cannot read it ({message}); {AGAIN}, or {CONVERT}"


def _finite(values: np.ndarray, marks: list[str]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()) or np.isfinite(values).all():
            return values
    bad = ~np.isfinite(values)
    count = int(bad.sum())
    if count > MAX_NON_FINITE * values.size:
        share = 100 * count / values.size
        raise BadAudio(f"{share:.0f} % of the samples are not numbers (NaN or infinite); export it again")
    values[bad] = 0.0
    marks.append(f"{count} non-finite samples set to 0")
    return values


def _mono(values: np.ndarray, marks: list[str]) -> np.ndarray:
    """(frames, channels) to (frames,): the mean, or the loudest channel where the mean would cancel."""
    frames, channels = values.shape
    if channels == 1:
        return values[:, 0]
    lanes = [np.ascontiguousarray(values[:, channel]) for channel in range(channels)]
    mixed = np.zeros(frames, dtype=np.float32)
    for lane in lanes:
        mixed += lane
    mixed /= np.float32(channels)
    powers = [_power(lane) for lane in lanes]
    if _power(mixed) < CANCELS * sum(powers) / channels**2:
        loudest = int(np.argmax(powers))
        marks.append(f"channels in opposite phase: kept channel {loudest + 1}")
        return lanes[loudest]
    marks.append(f"downmixed from {channels} channels")
    return mixed


def _power(samples: np.ndarray) -> float:
    """Variance, at the speed of a dot product; infinite for samples beyond all measure."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(samples.mean(dtype=np.float64))
        return float(np.dot(samples, samples)) / len(samples) - mean**2


def _level(samples: np.ndarray, marks: list[str]) -> np.ndarray:
    """Offset, clipping, loudness and silence, in this order."""
    low, high = float(samples.min()), float(samples.max())
    mean = float(samples.mean(dtype=np.float64))
    clipped = _flat(samples, high) or _flat(samples, low)
    if abs(mean) > OFFSET and abs(mean) > OFFSET_SHARE * float(samples.std(dtype=np.float64)):
        samples = samples - np.float32(mean)
        marks.append("constant offset removed")
        low, high = low - mean, high - mean
    peak = max(high, -low)
    if peak < SILENCE:
        marks.append("silent")
        return samples
    if clipped:
        marks.append("clipped")
    if peak > 1.0:
        if peak > 2.0 and peak > GLITCH * float(np.percentile(np.abs(samples), 99.9)):
            raise BadAudio(f"single samples reach {peak:.3g} where the rest is near 0; export it again")
        samples = samples / np.float32(peak)
        if peak > 1.01:  # lossy codecs overshoot by that much in half of all loud files
            marks.append(f"scaled down from peak {peak:.{1 if peak >= 10 else 2}f}")
    return samples


def _flat(samples: np.ndarray, rail: float) -> bool:
    """Whether the wave stands at its extreme value again and again, which only clipping does."""
    if abs(rail) < 0.1:
        return False
    level = np.float32(rail * 0.9999)
    at = np.flatnonzero(samples >= level if rail > 0 else samples <= level)
    runs = int(np.count_nonzero(np.diff(at) == 1))
    return runs >= 8 and runs * 2000 >= len(samples)
