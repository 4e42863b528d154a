"""How many bytes of audio a header declares, against what the file holds: a copy that broke off, or a placeholder.

WAV: http://soundfile.sapp.org/doc/WaveFormat. RF64: EBU Tech 3306. Wave64: Sony Pictures Digital, "Sony Wave64".
AIFF: Apple, "Audio Interchange File Format". AU: http://pubs.opengroup.org/external/auformat.html. NIST SPHERE: its
header is text. libsndfile reads what is there of all of them without a word.
"""

from __future__ import annotations

import re
import struct

RIFF_MAGIC = (b"RIFF", b"RF64")
MAX_CHUNKS = 64
PLACEHOLDER = 1 << 30  # a declared length of a gigabyte or more, where the file is shorter, was never filled in
UNKNOWN = 0xFFFFFFFF
NIST_FIELD = rb"^%s -i (\d{1,12})$"


def missing(data: bytes) -> int:
    """Bytes of audio that the header declares and the file lacks."""
    start, length = _audio(data)
    return max(0, start + length - len(data))


def is_cut(data: bytes) -> bool:
    """Whether more than a hundredth of a believable length is missing: a copy that broke off."""
    length = _audio(data)[1]
    return length < PLACEHOLDER and missing(data) * 100 > length


def riff_chunks(data: bytes) -> dict[bytes, tuple[int, int]]:
    """First chunk of each name: (offset of its content, declared bytes); stops after `data` or MAX_CHUNKS."""
    return _chunks(data, b"data", "<4sI")


def _chunks(data: bytes, last: bytes, form: str) -> dict[bytes, tuple[int, int]]:
    chunks: dict[bytes, tuple[int, int]] = {}
    position = 12
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from(form, data, position)
        chunks.setdefault(name, (position + 8, length))
        if name == last:
            break
        position += 8 + length + length % 2
    return chunks


def _audio(data: bytes) -> tuple[int, int]:
    """Where the audio begins and how many bytes it has by the header; (0, 0) if that does not say."""
    magic = data[:4]
    if magic in RIFF_MAGIC:
        return _riff(data)
    if magic == b"FORM":
        start, length = _chunks(data, b"SSND", ">4sI").get(b"SSND", (0, 0))
        return start, length
    if magic == b"riff":
        return _wave64(data)
    if magic in (b".snd", b"dns.") and len(data) >= 12:
        start, length = struct.unpack_from(">II" if magic == b".snd" else "<II", data, 4)
        return (start, length) if length != UNKNOWN else (0, 0)
    return _nist(data) if data.startswith(b"NIST_1A") else (0, 0)


def _riff(data: bytes) -> tuple[int, int]:
    chunks = riff_chunks(data)
    start, length = chunks.get(b"data", (0, 0))
    sizes = chunks.get(b"ds64", (0, 0))[0]
    if data[:4] == b"RF64" and length == UNKNOWN and 0 < sizes <= len(data) - 16:
        length = int(struct.unpack_from("<Q", data, sizes + 8)[0])
    return start, length


def _wave64(data: bytes) -> tuple[int, int]:
    """Chunks have a name of 16 bytes, a length of 8 that counts both, and begin at multiples of 8."""
    position = 40
    for _ in range(MAX_CHUNKS):
        if position + 24 > len(data):
            break
        length = int(struct.unpack_from("<Q", data, position + 16)[0])
        if data[position : position + 4] == b"data":
            return position + 24, max(0, length - 24)
        position += max(24, length + -length % 8)
    return 0, 0


def _nist(data: bytes) -> tuple[int, int]:
    size = re.match(rb"NIST_1A\n *(\d{1,6})\n", data)
    names = (b"sample_count", b"sample_n_bytes", b"channel_count")
    found = [re.search(NIST_FIELD % name, data[:1024], re.MULTILINE) for name in names]
    if size is None or found[0] is None or found[1] is None:
        return 0, 0
    length = 1
    for field in found:
        length *= int(field[1]) if field else 1
    return int(size[1]), length
