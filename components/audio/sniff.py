"""What a file is by its first bytes, and what its header declares: checked before any decoder sees it."""

from __future__ import annotations

import codecs
import struct

CONVERT = "convert it to WAV or FLAC, for example with: ffmpeg -i INPUT OUTPUT.flac"
AGAIN = "copy or download it again"
RIFF_MAGIC = (b"RIFF", b"RF64")
PLACEHOLDER = 1 << 30  # a declared WAV length of a gigabyte or more, where the file is shorter, was never filled in


def refusal(data: bytes) -> str | None:
    """Why `data` cannot be a usable recording, or None if a decoder may try.

    Only the first few hundred bytes are looked at, whatever the file's name says.
    """
    if not data:
        return f"the file is empty (0 bytes); {AGAIN}"
    return _not_audio(data) or _other_container(data) or _riff_fault(data) or _flac_fault(data)


def declares_nonsense(data: bytes) -> bool:
    """Whether a WAV header holds a placeholder for its length, as a writer leaves it that never came back to it."""
    return data[:4] == b"RIFF" and not _is_cut(data) and _missing(data) > 0


def ogg_is_cut(data: bytes) -> bool:
    """Whether an Ogg stream lacks its last page: the only sign, as an Ogg header declares no length (RFC 3533)."""
    if data[:4] != b"OggS":
        return False
    start = data.rfind(b"OggS")
    if len(data) < start + 27 or len(data) < start + 27 + data[start + 26]:
        return True
    lacing = data[start + 27 : start + 27 + data[start + 26]]
    return not data[start + 5] & 4 or len(data) < start + 27 + len(lacing) + sum(lacing)


def _not_audio(data: bytes) -> str | None:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the audio; run: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"this is a web page, not audio (a failed download?); {AGAIN}"
    if head[:1] in (b"{", b"["):
        return f"this is JSON text, not audio; {AGAIN}"
    if _is_text(data[:512]):
        return f"this is plain text, not audio; {AGAIN}"
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
    if data[4:8] == b"ftyp":
        return f"MP4 or M4A (AAC) is not read here; {CONVERT}"
    if data[:1] == b"\xff" and len(data) > 1 and data[1] & 0xF6 == 0xF0:
        return f"raw AAC (ADTS) is not read here; {CONVERT}"
    for magic, what in (
        (b"\x1aE\xdf\xa3", "WebM or Matroska"),
        (b"0&\xb2u", "Windows Media (WMA)"),
        (b"#!AMR", "AMR"),
        (b"ajkg", "Shorten"),
        (b"MAC ", "Monkey's Audio"),
        (b"wvpk", "WavPack"),
        (b"caff", "Apple CAF"),
    ):
        if data.startswith(magic):
            return f"{what} is not read here; {CONVERT}"
    for magic, what in ((b"PK\x03\x04", "zip"), (b"\x1f\x8b", "gzip")):
        if data.startswith(magic):
            return f"this is a {what} archive; unpack it first"
    return None


def _riff_chunks(data: bytes) -> dict[bytes, tuple[int, int]]:
    """First chunk of each name: (offset of its content, declared bytes); stops after `data` or after 64 chunks."""
    chunks: dict[bytes, tuple[int, int]] = {}
    position = 12
    for _ in range(64):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, position)
        chunks.setdefault(name, (position + 8, length))
        if name == b"data":
            break
        position += 8 + length + length % 2
    return chunks


def _missing(data: bytes) -> int:
    """Bytes of WAV audio that the header declares and the file lacks."""
    start, length = _riff_chunks(data).get(b"data", (0, 0))
    return max(0, start + length - len(data))


def _is_cut(data: bytes) -> bool:
    """Whether more than a hundredth of a believable length is missing: a copy that broke off."""
    _, length = _riff_chunks(data).get(b"data", (0, 0))
    return length < PLACEHOLDER and _missing(data) * 100 > length


def _riff_fault(data: bytes) -> str | None:
    if data[:4] not in RIFF_MAGIC:
        return None
    if data[8:12] != b"WAVE":
        return f"this is a RIFF file but not WAV; {CONVERT}"
    chunks = _riff_chunks(data)
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
    if data[:4] == b"RIFF" and _is_cut(data):
        return f"the audio breaks off: {_missing(data):,} bytes of what the WAV header declares are missing; {AGAIN}"
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
