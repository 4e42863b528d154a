"""From the bytes of one recording to the clips that a shard keeps of it, or the step that set them aside and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from components.audio.decode import BadAudio, decode
from components.audio.encode import to_flac, to_int16
from components.audio.exact import exact_samples
from components.audio.headers import fits, flac_md5
from components.audio.level import ONLY_NOTED
from components.schema import SAMPLE_RATE, Annotation, Clip, MediaKind
from components.shards.digests import of_bytes, of_md5, of_samples
from components.shards.group import Keyed
from components.shards.settings import Ingest
from components.shards.texts import language_fault, normalise, ratio_fault

DEFAULTS = Ingest()
NO_VIDEO = "video left out: the clip is a part of its recording"


class MediaMember(NamedTuple):
    """A picture or a video that passed components/audio/media.py."""

    kind: MediaKind
    suffix: str
    digest: str  # sha256
    data: bytes


class Sample(NamedTuple):
    """One clip as it is written."""

    clip: Clip
    audio: bytes
    record: bytes  # JSON
    source_digest: str  # of the recording's file
    suffix: str = "flac"  # of the audio's member
    fingerprint: tuple[int, ...] | None = None
    media: tuple[MediaMember, ...] = ()


class Aside(NamedTuple):
    """A clip that is not kept: its id, the step that set it aside, and one sentence of why and what to do."""

    id: str
    step: str
    reason: str


class Piece(NamedTuple):
    """A stretch of a recording: `(samples,)` float32, and where it begins in seconds of the decoded recording."""

    samples: np.ndarray
    start: float


def make_samples(
    keyed: Keyed, data: bytes, original: str, settings: Ingest = DEFAULTS, media: tuple[MediaMember, ...] = ()
) -> Iterator[Sample | Aside]:
    """Clips of the recording whose file is `data`; a file that fits already is kept byte for byte. Raises BadAudio.

    A picture goes with every clip. A video goes with a whole recording only: of a part it would show other times.
    """
    recording = keyed.recording
    pictures = tuple(one for one in media if one.kind == "image")
    whole = recording.start == 0.0 and recording.duration is None
    if settings.trust and whole:
        trusted = _by_header(keyed, data, original, settings)
        if trusted is not None:
            yield _with(trusted, media)
            return
    exact = exact_samples(data) if whole and settings.only_keeps else None
    samples, marks = exact or decode(data, original, settings.channels, recording.start, recording.duration)
    pieces = _pieces(samples, recording.annotation, settings)
    if pieces is None and whole:
        yield _with(_kept_or_aside(keyed, data, original, settings, samples, marks), media)
        return
    marks = marks if pictures == media else (*marks, NO_VIDEO)
    if pieces is None:
        yield _with(_kept_or_aside(keyed, b"", original, settings, samples, marks), pictures)
        return
    if not pieces:
        yield Aside(recording.annotation.id, "speech", "no speech was found in it; take it out or use cut=pauses")
    for number, piece in enumerate(pieces, 1):
        part, start = _named(keyed, number, piece, len(pieces)), recording.start + piece.start
        yield _with(_kept_or_aside(part, b"", original, settings, piece.samples, marks, start), pictures)


def _with(item: Sample | Aside, media: tuple[MediaMember, ...]) -> Sample | Aside:
    return item._replace(media=media) if isinstance(item, Sample) and media else item


def _pieces(samples: np.ndarray, noted: Annotation, settings: Ingest) -> list[Piece] | None:
    """Stretches that become clips of their own; None if the recording is not cut."""
    seconds = len(samples) / SAMPLE_RATE
    if settings.cut == "never" or (settings.cut == "pauses" and seconds <= settings.longest):
        return None
    if noted.text or noted.translation or noted.conversations:
        if seconds <= settings.longest:
            return None
        raise BadAudio(
            f"{seconds:.0f} s with one transcript cannot be cut at {settings.longest:.0f} s: give each sentence its "
            "start and duration in the manifest, or raise ingest.longest"
        )
    from components.audio.segments import segments_of, split_at_pauses

    if settings.cut == "pauses":
        places = split_at_pauses(samples, settings.longest)
    else:
        from components.audio.vad import speech_probabilities, speech_spans

        places = segments_of(samples, speech_spans(speech_probabilities(samples)), settings.longest)
    return [Piece(samples[begin:end], begin / SAMPLE_RATE) for begin, end in places]


def _named(keyed: Keyed, number: int, piece: Piece, count: int) -> Keyed:
    """Key and id of a piece: a number behind the recording's key, which nothing else can have in a data set."""
    noted = keyed.recording.annotation
    identity = f"{noted.id}@{piece.start:.3f}"
    recording = keyed.recording.model_copy(update={"annotation": noted.model_copy(update={"id": identity})})
    return Keyed(f"{keyed.key}--{number:0{max(4, len(str(count)))}d}", recording)


def _kept_or_aside(
    keyed: Keyed,
    data: bytes,
    original: str,
    settings: Ingest,
    samples: np.ndarray,
    marks: tuple[str, ...],
    start: float = 0.0,
) -> Sample | Aside:
    noted = _annotation(keyed.recording.annotation, settings)
    quality = _quality(samples, settings)
    fault = _fault(noted, len(samples) / SAMPLE_RATE, quality, settings)
    if fault:
        return Aside(noted.id, *fault)
    whole = samples if samples.dtype == np.int16 else to_int16(samples)
    audio, suffix, audio_digest = _stored(data, whole, marks)
    clip = Clip(
        **noted.model_dump(),
        key=keyed.key,
        seconds=len(whole) / SAMPLE_RATE,
        samples=len(whole),
        start=round(start or keyed.recording.start, 3),
        audio_digest=audio_digest,
        original=original,
        marks=marks,
        quality=quality,
    )
    return Sample(
        clip, audio, clip.model_dump_json().encode(), keyed.recording.digest, suffix, _fingerprint(samples, settings)
    )


def _stored(data: bytes, whole: np.ndarray, marks: tuple[str, ...]) -> tuple[bytes, str, str]:
    """Bytes, suffix and digest of the audio: those of the file where it fits and nothing had to be mended."""
    header = fits(data) if data and ONLY_NOTED.issuperset(marks) else None
    if header is not None and header.format == "OGG":
        return data, "ogg", of_bytes(data)
    kept = header is not None and header.frames == len(whole)
    return data if kept else to_flac(whole), "flac", of_samples(whole)


def _by_header(keyed: Keyed, data: bytes, original: str, settings: Ingest) -> Sample | Aside | None:
    """The sample of a FLAC that is believed; None if it does not fit or holds no sum of its samples."""
    header, md5 = fits(data), flac_md5(data)
    if header is None or header.format != "FLAC" or md5 is None:
        return None
    noted = _annotation(keyed.recording.annotation, settings)
    seconds = header.frames / SAMPLE_RATE
    fault = _fault(noted, seconds, {}, settings)
    if fault:
        return Aside(noted.id, *fault)
    clip = Clip(
        **noted.model_dump(),
        key=keyed.key,
        seconds=seconds,
        samples=header.frames,
        audio_digest=of_md5(md5),
        original=original,
    )
    return Sample(clip, data, clip.model_dump_json().encode(), keyed.recording.digest)


def _annotation(noted: Annotation, settings: Ingest) -> Annotation:
    if not settings.plain_text or not noted.text:
        return noted
    return noted.model_copy(update={"text": normalise(noted.text, noted.language)})


def _quality(samples: np.ndarray, settings: Ingest) -> dict[str, float]:
    if not settings.measures:
        return {}
    from components.audio.quality import measure

    return {name: round(value, 3) for name, value in measure(samples)._asdict().items() if np.isfinite(value)}


def _fingerprint(samples: np.ndarray, settings: Ingest) -> tuple[int, ...] | None:
    if not settings.fingerprints:
        return None
    from components.audio.fingerprint import fingerprint

    return tuple(fingerprint(samples).tolist())


def _fault(noted: Annotation, seconds: float, quality: dict[str, float], settings: Ingest) -> tuple[str, str] | None:
    """The step that sets a clip aside and its reason, or None."""
    least, most = settings.min_seconds, settings.max_seconds
    if least is not None and seconds < least:
        return "seconds", f"{seconds:.2f} s are less than ingest.min_seconds={least:g}"
    if most is not None and seconds > most:
        return "seconds", f"{seconds:.2f} s are more than ingest.max_seconds={most:g}"
    snr, bandwidth, clipped = (quality.get(name) for name in ("snr", "bandwidth", "clipped"))
    if settings.min_snr is not None and snr is not None and snr < settings.min_snr:
        return "snr", f"a signal to noise ratio of {snr:.1f} dB is below ingest.min_snr={settings.min_snr:g}"
    if settings.min_bandwidth is not None and bandwidth is not None and bandwidth < settings.min_bandwidth:
        return "bandwidth", f"{bandwidth:.0f} Hz of bandwidth are below ingest.min_bandwidth={settings.min_bandwidth:g}"
    if settings.max_clipped is not None and clipped is not None and clipped > settings.max_clipped:
        return (
            "clipped",
            f"{clipped:.1%} of the samples are clipped, more than ingest.max_clipped={settings.max_clipped:g}",
        )
    if noted.text:
        reason = language_fault(noted.text, noted.language) if settings.check_language else None
        reason = reason or (ratio_fault(noted.text, seconds) if settings.check_rate else None)
        if reason:
            return "text", reason
    return None
