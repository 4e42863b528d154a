"""What is read at all: the bounds of a recording, and the error that says why one is set aside."""

from __future__ import annotations

MIN_SECONDS = 0.05
MAX_SECONDS = 3600.0  # of one clip
MAX_FILE_SECONDS = 12 * 3600.0  # of a file that clips are cut out of
MAX_CHANNELS = 32
RATES = range(4_000, 384_001)  # hertz
MAX_VALUES = 1 << 28  # samples times channels: 1 GiB as float32
BLOCK = 1 << 20  # values decoded at a time, so that a header that lies costs no memory


class BadAudio(ValueError):
    """A file that is set aside; `reason` is one sentence that says what is wrong and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_form(rate: int, channels: int) -> None:
    """BadAudio unless the rate in hertz and the number of channels are ones that are read."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadAudio(f"{channels} channels, at most {MAX_CHANNELS} are read; mix it down first")
    if rate not in RATES:
        raise BadAudio(f"a sample rate of {rate} Hz is outside {RATES[0]} to {RATES[-1]} Hz; resample it first")


def check_length(frames: int, rate: int, channels: int) -> None:
    """BadAudio if so many frames are too many for one clip."""
    if frames / rate > MAX_SECONDS or frames * channels > MAX_VALUES:
        limit = min(MAX_SECONDS, MAX_VALUES / channels / rate) / 60
        much = f"{frames / rate / 60:.0f} minutes are too many for one clip"
        raise BadAudio(f"{much}; cut it into clips of at most {limit:.0f} minutes")


def too_short(frames: int, rate: int) -> str:
    """Why a clip of so few frames is set aside."""
    if frames == 0:
        return "the file has a header but holds no audio; record or export it again"
    lasts, least = 1000 * frames / rate, 1000 * MIN_SECONDS
    return f"it lasts {lasts:.1f} ms, less than {least:.0f} ms; leave it out or join it to its neighbour"
