"""What the header of a FLAC or Ogg file declares, read by hand in microseconds: for files that may be kept as they are.

FLAC: RFC 9639, section 8.2. Ogg: RFC 3533, section 6. Vorbis I, section 4.2.2. Ogg Opus: RFC 7845, sections 4 and 5.1.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from components.audio.bounds import MAX_SECONDS, MIN_SECONDS
from components.schema import SAMPLE_RATE


class Header(NamedTuple):
    """What a file declares about its audio, in the names of libsndfile."""

    rate: int  # hertz, of the decoded samples
    channels: int
    frames: int  # 0: not declared
    subtype: str  # PCM_16, PCM_24, VORBIS, OPUS
    format: str  # FLAC or OGG


def header(data: bytes) -> Header | None:
    """The header of a FLAC or of an Ogg file with one Vorbis or Opus stream; None for anything else or damaged."""
    if data[:4] == b"fLaC":
        return _flac(data)
    if data[:4] == b"OggS":
        return _ogg(data)
    return None


def fits(data: bytes) -> Header | None:
    """The header of a file that a shard could keep byte for byte: 16 kHz mono, as FLAC of 16 bit or as Ogg Vorbis.

    Opus never fits, whatever rate it was made from: it decodes to 48 kHz. Nothing is decoded: a damaged file may fit.
    """
    found = header(data)
    if found is None or (found.rate, found.channels) != (SAMPLE_RATE, 1) or found.subtype not in ("PCM_16", "VORBIS"):
        return None
    return found if MIN_SECONDS <= found.frames / SAMPLE_RATE <= MAX_SECONDS else None


def flac_md5(data: bytes) -> str | None:
    """The MD5 of its samples that a FLAC declares, in hexadecimal; None if it is no FLAC or its encoder left it out."""
    if _flac(data) is None or not any(data[26:42]):
        return None
    return data[26:42].hex()


def _flac(data: bytes) -> Header | None:
    if len(data) < 42 or data[:4] != b"fLaC" or data[4] & 0x7F or data[5:8] != b"\0\0\x22":
        return None
    packed = int.from_bytes(data[18:26], "big")  # 20 bits of rate, 3 of channels, 5 of bits a sample, 36 of frames
    rate, channels, bits = packed >> 44, (packed >> 41 & 7) + 1, (packed >> 36 & 31) + 1
    return Header(rate, channels, packed & ((1 << 36) - 1), f"PCM_{bits}", "FLAC") if rate else None


def _ogg(data: bytes) -> Header | None:
    """By the identification header in the first page and the position in the last; all pages must be of one stream."""
    begin, after = _page(data, 0)
    last, position = 0, after
    while position and position < len(data):  # 4 kB a page, half a microsecond each
        head = data[position : position + 18]
        if head[:4] != b"OggS" or len(head) < 18 or head[5] & 2 or head[14:] != data[14:18]:
            return None  # flag 2: another stream begins
        last, position = position, _page(data, position)[1]
    if not last or position != len(data):
        return None
    flags, position = struct.unpack_from("<Bq", data, last + 5)
    if not flags & 4 or position < 0:
        return None
    first = data[begin:after]
    if first[:7] == b"\x01vorbis" and len(first) >= 30:
        channels, rate = struct.unpack_from("<BI", first, 11)
        return Header(rate, channels, position, "VORBIS", "OGG")
    if first[:8] == b"OpusHead" and len(first) >= 19:
        channels, skip = struct.unpack_from("<BH", first, 9)
        return Header(48_000, channels, max(0, position - skip), "OPUS", "OGG")
    return None


def _page(data: bytes, start: int) -> tuple[int, int]:
    """Where the content of an Ogg page begins, and where the page ends; (0, 0) if it is cut."""
    if start + 27 > len(data):
        return 0, 0
    begin = start + 27 + data[start + 26]
    end = begin + sum(data[start + 27 : begin])
    return (begin, end) if end <= len(data) else (0, 0)
