"""Recordings that libsndfile does not read: MP4, Matroska, WebM, AAC, Windows Media, AMR, CAF, through PyAV (FFmpeg).

The demuxer is named after a look at the bytes and reads from memory alone, so that no playlist and no address inside a
file leads anywhere; demuxers and decoders are the ones listed here. Ogg Opus comes this way too: the same libopus is
about twice as fast as through libsndfile, and its samples are the same to 2e-7.
"""

from __future__ import annotations

import ctypes
import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from components.audio.bounds import BLOCK, BadAudio, check_form
from components.audio.crop import Block, gather
from components.audio.sniff import AGAIN, CONVERT, demuxer

if TYPE_CHECKING:
    from av import AudioCodecContext, AudioFrame, AudioStream, Packet
    from av.container import InputContainer
    from av.error import FFmpegError

DECODERS = (
    *("aac", "alac", "opus", "libopus", "vorbis", "flac", "mp3", "mp3float", "mp2", "mp2float", "ac3", "eac3"),
    *("wmav1", "wmav2", "wmapro", "wmalossless", "amrnb", "amrwb", "pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s8"),
    *("pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be"),
    *("pcm_f64le", "pcm_f64be"),
)
OPTIONS = {
    "codec_whitelist": ",".join(DECODERS),  # also holds back the decoders of pictures while FFmpeg looks at the file
    "protocol_whitelist": "none",
    "max_streams": "32",
    "probesize": str(1 << 21),
}
LARGEST = 64 << 20  # bytes that FFmpeg may allocate in one piece: the sample table of 12 h of AAC has 48 MB
REREAD = 4  # times the bytes of the file that its packets may have in all: a table may point to the same place again
SKIP_MANUAL = 1 << 29  # AV_CODEC_FLAG2_SKIP_MANUAL
STUCK = 120.0  # seconds in which FFmpeg must come forward


def read_container(data: bytes) -> tuple[np.ndarray, int]:
    """All of the first audio track, (frames, channels) float32, and its rate in hertz.

    What the encoder put before and after the audio is taken off as the file declares it. Raises BadAudio, with the
    bounds of components/audio/bounds.py, which hold while it is decoded, whatever the header says.
    """
    cut = gather(container_blocks(data), 0.0, None)
    return cut.values, cut.rate


def container_blocks(data: bytes) -> Iterator[Block]:
    """The first audio track in blocks of about BLOCK values, from the front; see `read_container`."""
    import av

    name = demuxer(data)
    if name is None:
        raise BadAudio(f"the format is not recognised as audio; {CONVERT}")
    try:
        with open_container(data, name) as container:
            stream = _first_track(container)
            yield from _decoded(container, stream, _context(stream), REREAD * len(data) + BLOCK)
    except av.FFmpegError as error:
        raise BadAudio(_decoder_says(error)) from error


@contextmanager
def open_container(data: bytes, name: str) -> Iterator[InputContainer]:
    """The container in `data` under the demuxer `name`, held to what the head of this file says.

    Raises BadAudio for a file that wants another opened, and FFmpegError.
    """
    import av

    _hold_allocations()
    with av.open(
        io.BytesIO(data),
        mode="r",
        format=name,
        container_options=OPTIONS,
        metadata_errors="replace",
        buffer_size=1 << 16,
        timeout=STUCK,
        io_open=_refuse,
    ) as container:
        yield container


def _decoder_says(error: FFmpegError) -> str:
    if isinstance(error, MemoryError):  # see LARGEST
        return f"its header declares larger tables than a recording has; {AGAIN}, or {CONVERT}"
    return f"the decoder cannot read it ({error.strerror}); {AGAIN}, or {CONVERT}"


def _refuse(*_: object) -> NoReturn:
    """Whatever a file wants opened besides itself; no demuxer on the list asks by default."""
    raise BadAudio(f"it refers to another file, and none is opened; {CONVERT}")


@functools.cache
def _hold_allocations() -> None:
    """A header that declares a table of 2^40 samples then meets an error of FFmpeg's instead of memory."""
    import av

    here = Path(av.__file__).parent
    for library in (*here.parent.glob("av.libs/libavutil-*"), *here.glob(".dylibs/libavutil.*")):
        ctypes.CDLL(str(library)).av_max_alloc(ctypes.c_size_t(LARGEST))


def _first_track(container: InputContainer) -> AudioStream:
    from av.stream import Discard

    if not container.streams.audio:
        raise BadAudio("the file holds no audio track; leave it out")
    stream = container.streams.audio[0]
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    return stream


def _context(stream: AudioStream) -> AudioCodecContext:
    """The decoder of a track, not yet open."""
    import av

    found: AudioCodecContext | None = stream.codec_context
    name = found.name if found is not None else "an unknown codec"
    if found is None or name not in DECODERS:
        raise BadAudio(f"{name} in {stream.container.format.name.split(',')[0]} is not read here; {CONVERT}")
    if found.sample_rate:
        check_form(found.sample_rate, found.layout.nb_channels)
    context = found
    if name == "opus":  # FFmpeg's own differs from libopus audibly (14 dB of difference where it is in its speech mode)
        context = av.AudioCodecContext.create("libopus", "r")
        context.extradata = found.extradata
        context.layout = found.layout
        context.sample_rate = 48_000
        context.options = {"request_sample_fmt": "flt"}
    if name == "alac" and stream.container.format.name == "caf":
        context.flags2 |= SKIP_MANUAL  # the last packet is short already, and would be shortened once more
    context.options = {**context.options, "max_samples": str(BLOCK)}
    context.thread_count = 1
    return context


def _decoded(container: InputContainer, stream: AudioStream, context: AudioCodecContext, limit: int) -> Iterator[Block]:
    rate, at, held, lasts = 0, 0, 0, 0.0
    values: list[np.ndarray] = []
    for packet in _packets(container, stream, limit):
        lasts = _lasts(packet, lasts)
        for frame in context.decode(packet):
            form = (frame.sample_rate, frame.layout.nb_channels)
            if values and (form != (rate, values[0].shape[1]) or held >= BLOCK):
                block = np.concatenate(values)
                yield Block(rate, at, block)
                at, held, values = at + len(block), 0, []
            rate = frame.sample_rate
            values.append(_values(frame))
            held += values[-1].size
    if not values:
        raise BadAudio("the file has a header but holds no audio; record or export it again")
    block = np.concatenate(values)
    padding = at + len(block) - round(lasts * rate)
    if container.format.name.startswith("mov") and 0 < padding < len(values[-1]):
        block = block[:-padding]  # AAC has whole packets only; MP4 says how much of the last one counts
    yield Block(rate, at, block)


def _packets(container: InputContainer, stream: AudioStream, limit: int) -> Iterator[Packet | None]:
    """The packets of a track, and None at the end; BadAudio if one is damaged or they hold more than `limit` bytes."""
    for packet in container.demux(stream):
        if packet.size == 0:  # the mark at the end, or an empty block, which would end decoding
            continue
        limit -= packet.size
        if limit < 0:
            raise BadAudio(f"its index points to the same bytes again and again; {CONVERT}")
        if packet.is_corrupt:
            raise BadAudio(f"the audio data are damaged or cut off (a packet is not whole); {AGAIN}")
        yield packet
    yield None


def _lasts(packet: Packet | None, before: float) -> float:
    """Second of the track at which this packet ends, by the file; where it does not say, as before."""
    if packet is None or packet.pts is None or packet.duration is None or packet.time_base is None:
        return before
    return float((packet.pts + packet.duration) * packet.time_base)


def _values(frame: AudioFrame) -> np.ndarray:
    """(frames, channels) float32 of one decoded frame, whatever its sample format."""
    values: Any = frame.to_ndarray()  # (channels, frames) planar, else (1, frames * channels)
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if values.dtype == np.uint8:
        values = (values.astype(np.float32) - np.float32(128)) / np.float32(128)
    if values.dtype.kind == "i":
        values = values / np.float32(-float(np.iinfo(values.dtype).min))
    return np.asarray(values, np.float32)
