"""What a file is by its first bytes, and what its header declares: checked before any decoder sees it."""

from __future__ import annotations

import codecs
import struct

from components.audio.declared import RIFF_MAGIC, is_cut, missing, riff_chunks

CONVERT = "convert it to WAV or FLAC, for example with: ffmpeg -i INPUT OUTPUT.flac"
AGAIN = "copy or download it again"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # what MP4 and QuickTime begin with
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # Windows Media, ASF specification 1.2, section 10.1
MAX_PARTS = 1 << 16  # parts of a container that are walked over


def refusal(data: bytes) -> str | None:
    """Why `data` cannot be a usable recording, or None if a decoder may try.

    Only the first few hundred bytes are looked at, whatever the file's name says.
    """
    if not data:
        return f"the file is empty (0 bytes); {AGAIN}"
    return not_media(data) or _other_container(data) or _riff_fault(data) or _flac_fault(data) or _length_fault(data)


def demuxer(data: bytes) -> str | None:
    """The FFmpeg demuxer of a file that components/audio/containers.py reads; None: it is libsndfile's."""
    if data[4:8] in MP4_BOXES:
        return "mov"
    for magic, name in (
        (b"\x1aE\xdf\xa3", "matroska"),
        (ASF_HEADER, "asf"),
        (b"#!AMR", "amr"),
        (b"caff", "caf"),
    ):
        if data.startswith(magic):
            return name
    if data[:4] == b"OggS" and len(data) > 27 and data.startswith(b"OpusHead", 27 + data[26]):
        return "ogg"
    sync = _id3(data)
    return "aac" if int.from_bytes(data[sync : sync + 2], "big") & 0xFFF6 == 0xFFF0 else None


def declares_nonsense(data: bytes) -> bool:
    """Whether a header holds a placeholder for its length, as a writer leaves it that never came back to it."""
    return not is_cut(data) and missing(data) > 0


def ogg_is_cut(data: bytes) -> bool:
    """Whether an Ogg stream lacks its last page: the only sign, as an Ogg header declares no length (RFC 3533)."""
    if data[:4] != b"OggS":
        return False
    start = data.rfind(b"OggS")
    if len(data) < start + 27 or len(data) < start + 27 + data[start + 26]:
        return True
    lacing = data[start + 27 : start + 27 + data[start + 26]]
    return not data[start + 5] & 4 or len(data) < start + 27 + len(lacing) + sum(lacing)


def not_media(data: bytes, what: str = "audio") -> str | None:
    """What a file is that should be `what` and is text, zeros or a placeholder for itself; None if it is neither."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; run: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"this is a web page, not {what} (a failed download?); {AGAIN}"
    if head[:1] in (b"{", b"["):
        return f"this is JSON text, not {what}; {AGAIN}"
    if _is_text(data[:512]):
        return f"this is plain text, not {what}; {AGAIN}"
    if not any(data[:512]) and not data.strip(b"\0"):
        return f"the file holds only zero bytes; {AGAIN}"
    return None


def _is_text(head: bytes) -> bool:
    if head.startswith(b"NIST_1A"):
        return False
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in head[2:4]:
        head = head.decode("utf-16", errors="ignore").encode()
    text = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        letters = text.decode(head)
    except UnicodeDecodeError:
        return False
    return len(set(letters)) > 1 and all(letter.isprintable() or letter in "\t\r\n\ufeff" for letter in letters)


def _other_container(data: bytes) -> str | None:
    for magic, what in ((b"ajkg", "Shorten"), (b"MAC ", "Monkey's Audio"), (b"wvpk", "WavPack")):
        if data.startswith(magic):
            return f"{what} is not read here; {CONVERT}"
    for magic, what in ((b"PK\x03\x04", "zip"), (b"\x1f\x8b", "gzip")):
        if data.startswith(magic):
            return f"this is a {what} archive; unpack it first"
    return None


def _riff_fault(data: bytes) -> str | None:
    if data[:4] not in RIFF_MAGIC:
        return None
    if data[8:12] != b"WAVE":
        return f"this is a RIFF file but not WAV; {CONVERT}"
    chunks = riff_chunks(data)
    offset, length = chunks.get(b"fmt ", (0, 0))
    if length < 16 or offset + 16 > len(data):
        return f"the WAV header is damaged (no usable fmt chunk); {AGAIN}"
    code, channels, rate = struct.unpack_from("<HHI", data, offset)
    if channels == 0 or rate == 0:
        what = "0 channels" if channels == 0 else "a sample rate of 0 Hz"
        return f"the WAV header declares {what}; write the file again with the right header"
    if code not in WAV_CODES:
        known = WAV_REFUSED.get(code)
        return (
            f"WAV with {known} is not read here; {CONVERT}"
            if known
            else (f"the WAV header is damaged (unknown format code {code}); {AGAIN}")
        )
    return None


# https://www.rfc-editor.org/rfc/rfc2361 and WAVE_FORMAT_EXTENSIBLE
WAV_CODES = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law", 0x55: "MP3", 0xFFFE: "extensible"}
WAV_REFUSED = {2: "ADPCM", 0x11: "ADPCM", 0x14: "ADPCM", 0x31: "GSM 6.10", 0x40: "ADPCM", 0x64: "ADPCM", 0xFF: "AAC"}


def _flac_fault(data: bytes) -> str | None:
    if data[:4] != b"fLaC":
        return None
    if len(data) < 42 or data[4] & 0x7F != 0:
        return f"the FLAC header is damaged (no STREAMINFO block); {AGAIN}"
    rate = int.from_bytes(data[18:21], "big") >> 4
    if rate == 0:
        return f"the FLAC header is damaged (a sample rate of 0 Hz); {AGAIN}"
    return None


def _id3(data: bytes) -> int:
    """Bytes of the ID3v2 tag at the start: its length stands in four bytes of 7 bits."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    return 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))


def _length_fault(data: bytes) -> str | None:
    lacks = missing(data) if is_cut(data) else beyond_the_end(data)
    if lacks <= 0:
        return None
    return f"the audio breaks off: {lacks:,} bytes of what the header declares are missing; {AGAIN}"


def beyond_the_end(data: bytes) -> int:
    """Bytes by which the last outer part of an MP4, Matroska, ASF or CAF file is longer than what is there."""
    name = demuxer(data)
    part = {"mov": _box, "asf": _asf_object, "caf": _caf_chunk}.get(name or "")
    if name == "matroska":
        return max(0, _matroska_end(data) - len(data))
    position = 8 if name == "caf" else 0
    for _ in range(MAX_PARTS if part else 0):
        size = part(data, position) if part else 0
        if size <= 0:
            return 0
        position += size
        if position >= len(data):
            return position - len(data)
    return 0


def _box(data: bytes, at: int) -> int:
    """Bytes of an MP4 box (ISO/IEC 14496-12, section 4.2); 0 if it goes on to the end or is none."""
    if at + 16 > len(data):
        return 0
    size = int.from_bytes(data[at : at + 4], "big")
    size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
    return size if size >= 8 and all(0x20 <= letter < 0x7F or letter == 0xA9 for letter in data[at + 4 : at + 8]) else 0


def _asf_object(data: bytes, at: int) -> int:
    size = int.from_bytes(data[at + 16 : at + 24], "little")
    return size if at + 24 <= len(data) and size >= 24 else 0


def _caf_chunk(data: bytes, at: int) -> int:
    """Bytes of a chunk of Apple's Core Audio Format with its head; 0 where the length is -1, not known."""
    size = int.from_bytes(data[at + 4 : at + 12], "big", signed=True)
    return size + 12 if at + 12 <= len(data) and size >= 0 else 0


def _matroska_end(data: bytes) -> int:
    """Where the segment of a Matroska file ends by its header (RFC 8794, section 6); 0 if it does not say."""
    position = 4
    for identifier in (b"", b"\x18\x53\x80\x67"):  # the EBML head, then the segment
        if data[position : position + len(identifier)] != identifier or position + len(identifier) >= len(data):
            return 0
        position += len(identifier)
        octets = 9 - data[position].bit_length()
        field = int.from_bytes(data[position : position + octets], "big")
        size = field & ((1 << 7 * octets) - 1)
        if octets > 8 or size == (1 << 7 * octets) - 1:  # all ones: a live stream
            return 0
        position += octets + size
    return position
