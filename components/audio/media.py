"""Pictures and videos beside audio: which ones a row names, and which may go into a shard, byte for byte.

Nothing is decoded. Pictures are known by their headers: PNG (ISO/IEC 15948, section 11.2.2), JPEG (ITU-T T.81, annex
B), WebP (RFC 9649, section 2), GIF89a, and BMP (BITMAPCOREHEADER and BITMAPINFOHEADER of the Windows API).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from struct import unpack_from
from typing import TYPE_CHECKING, Any, NamedTuple

from components.audio.bounds import BadAudio
from components.audio.rows import BadRow, FoundMedia, within
from components.audio.sniff import AGAIN, MAX_PARTS, beyond_the_end, demuxer, not_media
from components.schema import MediaKind

if TYPE_CHECKING:
    from av.container import InputContainer

KINDS: tuple[MediaKind, ...] = ("image", "video")
SUFFIXES: dict[str, MediaKind] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv", "mov", "avi"), "video"),
}
LIMITS: dict[MediaKind, int] = {"image": 64 << 20, "video": 512 << 20}  # bytes
MAX_SIDE = 16_384  # pixels

REMUX = "write it anew, for example with: ffmpeg -i INPUT -c copy OUTPUT.mp4"


class BadMedia(BadAudio):
    """A picture or a video for which its recording is set aside; `reason` as in BadAudio."""


class Picture(NamedTuple):
    """What the header of a picture says."""

    width: int  # pixels
    height: int  # pixels
    whole: bool  # whether its end is there


# ---- what a row names -----------------------------------------------------------------------------------------------


def row_media(root: str, folder: str, fields: dict[str, Any], names: frozenset[str]) -> tuple[FoundMedia, ...]:
    """The files in the fields `image` and `video` of a row, resolved as its audio is. Raises BadRow."""
    found: list[FoundMedia] = []
    for kind in KINDS:
        value = fields.get(kind)
        if isinstance(value, dict):
            value = value.get("path")
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise BadRow(f"the field {kind} is a JSON {type(value).__name__}; name one file, or leave it out")
        try:
            found.append(FoundMedia(kind, within(root, folder, value.strip(), names)))
        except BadRow as error:
            raise BadRow(f"its {kind}: {error}") from None
    return tuple(found)


# ---- what may go into a shard ---------------------------------------------------------------------------------------


def check_size(kind: MediaKind, size: int) -> None:
    """BadMedia if so many bytes are too many."""
    if size > LIMITS[kind]:
        raise BadMedia(f"it has {size >> 20} MiB, at most {LIMITS[kind] >> 20} are taken; make it smaller")


def check_media(kind: MediaKind, data: bytes) -> str:
    """The suffix of a picture or a video by its bytes, whatever its name says. Raises BadMedia.

    Of a picture its header is read and its end looked for; a video is opened, and must have a video track with a
    duration and a first picture. So a file that is damaged in between passes.
    """
    check_size(kind, len(data))
    if not data:
        raise BadMedia(f"the file is empty (0 bytes); {AGAIN}")
    return _check_image(data) if kind == "image" else _check_video(data)


def _check_image(data: bytes) -> str:
    found = next((form for form in _FORMS if form[1](data)), None)
    if found is None:
        raise BadMedia(not_media(data, "an image") or "it is no PNG, JPEG, WebP, GIF or BMP; convert it to one of them")
    suffix, _, read = found
    picture = read(data)
    if picture is None:
        raise BadMedia(f"the header of the {suffix} is damaged; {AGAIN}")
    _check_sides(picture.width, picture.height)
    if not picture.whole:
        raise BadMedia(f"the {suffix} breaks off: its end is missing; {AGAIN}")
    return suffix


def _check_sides(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise BadMedia(f"its header declares {width} x {height} pixels, 1 to {MAX_SIDE} a side are taken; resize it")


def _png(data: bytes) -> Picture | None:
    if data[8:16] != b"\0\0\0\rIHDR" or data[29:33] != zlib.crc32(data[12:29]).to_bytes(4, "big"):
        return None
    width, height = unpack_from(">II", data, 16)
    return Picture(width, height, whole=data.rfind(b"IEND\xaeB`\x82") > 0)


def _jpeg(data: bytes) -> Picture | None:
    """By the first frame header; a thumbnail lies before it, within a segment that is skipped."""
    at = 2
    for _ in range(MAX_PARTS):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # no length behind it
            at += 2
        elif marker in (0xD9, 0xDA):  # the picture begins or ends, and no frame header came
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = unpack_from(">HH", data, at + 5)
            return Picture(width, height, whole=data.rfind(b"\xff\xd9", at) > 0)
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def _webp(data: bytes) -> Picture | None:
    if len(data) < 30:
        return None
    whole = 8 + int.from_bytes(data[4:8], "little") <= len(data)
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return Picture(width, height, whole)
    if data[12:16] == b"VP8L" and data[20] == 0x2F:
        sides = int.from_bytes(data[21:25], "little")
        return Picture((sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1, whole)
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", data, 26)
        return Picture(width & 0x3FFF, height & 0x3FFF, whole)
    return None


def _gif(data: bytes) -> Picture | None:
    if len(data) < 13:
        return None
    width, height = unpack_from("<HH", data, 6)
    return Picture(width, height, whole=data.rstrip(b"\0")[-1:] == b";")


def _bmp(data: bytes) -> Picture | None:
    if len(data) < 34:
        return None
    start, header = unpack_from("<II", data, 10)
    if header == 12:
        (width, height, _, bits), compression = unpack_from("<HHHH", data, 18), 0
    else:
        width, height, _, bits, compression = unpack_from("<iiHHI", data, 18)
    height = abs(height)  # negative: from the top down
    rows = (width * bits + 31) // 32 * 4 * height if compression in (0, 3) else 0
    return Picture(width, height, whole=start + rows <= len(data))


_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))

# suffix, whether a file is of this form, and its header
_FORMS: tuple[tuple[str, Callable[[bytes], bool], Callable[[bytes], Picture | None]], ...] = (
    ("png", lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), _png),
    ("jpg", lambda data: data.startswith(b"\xff\xd8\xff"), _jpeg),
    ("webp", lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", _webp),
    ("gif", lambda data: data[:6] in (b"GIF87a", b"GIF89a"), _gif),
    ("bmp", lambda data: data[:2] == b"BM" and data[14:18] in _BMP_HEADERS, _bmp),
)


def _check_video(data: bytes) -> str:
    import av

    from components.audio.containers import open_container

    suffix, name = _video_form(data)
    missing = 8 + int.from_bytes(data[4:8], "little") - len(data) if name == "avi" else beyond_the_end(data)
    if missing > 0:
        raise BadMedia(f"the video breaks off: {missing:,} bytes of what its header declares are missing; {AGAIN}")
    try:
        with open_container(data, name) as container:
            _check_track(container)
    except MemoryError as error:  # FFmpeg's own, where a header declares tables that are too large
        if not isinstance(error, av.FFmpegError):
            raise
        raise BadMedia(f"its header declares larger tables than a video has; {AGAIN}, or {REMUX}") from error
    except BadMedia:
        raise
    except BadAudio as error:
        raise BadMedia(f"it refers to another file, and none is opened; {REMUX}") from error
    except av.FFmpegError as error:
        raise BadMedia(f"the container cannot be read ({error.strerror}); {AGAIN}, or {REMUX}") from error
    return suffix


def _video_form(data: bytes) -> tuple[str, str]:
    """Suffix and demuxer of a video by its bytes. Raises BadMedia."""
    name = "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else demuxer(data)
    if name == "avi":
        return "avi", name
    if name == "mov":
        return "mp4" if data[4:8] == b"ftyp" and data[8:12] != b"qt  " else "mov", name
    if name == "matroska":
        kind = data.find(b"\x42\x82", 4, 64)  # DocType, RFC 8794, section 11.2.6
        return "webm" if kind > 0 and b"webm" in data[kind : kind + 16] else "mkv", name
    raise BadMedia(not_media(data, "a video") or "it is no MP4, QuickTime, WebM, Matroska or AVI; convert it to MP4")


def _check_track(container: InputContainer) -> None:
    """BadMedia unless there is a video track, not of a cover alone, that lasts and begins."""
    from av.stream import Disposition

    cover = Disposition.attached_pic
    films = [one for one in container.streams.video if not one.disposition & cover]
    if not films:
        raise BadMedia(f"no video track is found in it; name the right file, or {AGAIN}")
    context = films[0].codec_context
    if context is None:
        raise BadMedia("its video codec is unknown; convert it to MP4 with H.264")
    _check_sides(context.width or 1, context.height or 1)  # of MPEG-4 video only its decoder, held back, knows them
    if (films[0].duration or 0) <= 0 and (container.duration or 0) <= 0:
        raise BadMedia(f"it does not say how long it lasts, as a live recording; {REMUX}")
    packet = next(container.demux(films[0]), None)
    if packet is None or packet.size == 0 or packet.is_corrupt:
        raise BadMedia(f"the video breaks off before its first picture; {AGAIN}")
