"""Pictures and videos beside audio: taken byte for byte into the shard and back, or set aside with a reason."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_helpers import run_ingest, run_publish, tone

from components.audio import media
from components.audio.identity import digest_of
from components.audio.media import LIMITS, MAX_SIDE, BadMedia, check_media
from components.audio.sources import read_sources
from components.digest import digest_bytes
from components.schema import MediaKind, Recording, Reject
from components.shards.group import plan_groups
from components.shards.index import Rows, read_rows, to_table
from components.shards.ingest import ingest_group
from components.shards.parts import finished_part, group_digest, identity_of
from components.shards.reader import ShardReader, verify_shard
from components.shards.samples import NO_VIDEO
from components.shards.settings import Ingest
from infra import storage

av = pytest.importorskip("av")

PICTURES = {
    "png": ("png", "rgb24"),
    "jpg": ("mjpeg", "yuvj420p"),
    "webp": ("libwebp", "yuv420p"),
    "bmp": ("bmp", "bgr24"),
}
FILMS = {
    "mp4": ("mp4", "mpeg4"),
    "mov": ("mov", "mpeg4"),
    "mkv": ("matroska", "mpeg4"),
    "webm": ("webm", "libvpx"),
    "avi": ("avi", "mpeg4"),
}


@cache
def picture(suffix: str, seed: int = 0) -> bytes:
    """48 x 32 pixels of noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, format="rgb24")
    if suffix == "gif":
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="gif") as container:
            stream = container.add_stream("gif", rate=1)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb8"
            container.mux([*stream.encode(frame.reformat(format="rgb8")), *stream.encode(None)])
        return buffer.getvalue()
    codec, pixels = PICTURES[suffix]
    context = av.VideoCodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt, context.time_base = 48, 32, pixels, Fraction(1, 1)
    frame = frame.reformat(format=pixels)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))


@cache
def film(suffix: str, pictures: int = 5, **options: str) -> bytes:
    """Half a second of 64 x 48 pixels that grow lighter."""
    muxer, codec = FILMS[suffix]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer, options={"fflags": "bitexact", **options}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(pictures):
            grey = np.full((48, 64, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that is right but for what it declares."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    start = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
    return start + b"\0\0\0\0IEND\xaeB`\x82"


def fill(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def jsonl(*rows: Mapping[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def whole(data: str, lake: Path) -> tuple[str, Rows, list[Reject]]:
    """A published data set: its root, rows and rejects."""
    recordings, rejects = read_sources(data)
    root = str(lake / "audio/seen/v1")
    run_ingest(root, recordings, data)
    manifest = run_publish(root, recordings, data)
    for shard in manifest.shards:
        verify_shard(root, shard)
    lines = storage.read_text(storage.join(root, "rejects.jsonl")).splitlines()
    return root, read_rows(root), [*rejects, *map(Reject.model_validate_json, lines)]


# ---- what passes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*PICTURES, "gif"])
def test_a_picture_is_known_by_its_bytes_and_a_cut_one_is_refused(suffix: str) -> None:
    data = picture(suffix)
    assert check_media("image", data) == suffix
    for share in (0.1, 0.5, 0.99):
        with pytest.raises(BadMedia, match=r"breaks off: its end is missing; copy|is damaged; copy"):
            check_media("image", data[: int(share * len(data))])
    with pytest.raises(BadMedia, match="it is no MP4, QuickTime, WebM, Matroska or AVI"):
        check_media("video", data)


@pytest.mark.parametrize("suffix", FILMS)
def test_a_video_is_known_by_its_bytes_and_a_cut_one_is_refused(suffix: str) -> None:
    data = film(suffix)
    assert check_media("video", data) == suffix
    for share in (0.3, 0.6, 0.98):
        with pytest.raises(BadMedia, match=r"breaks off|cannot be read|no video track is found"):
            check_media("video", data[: int(share * len(data))])
    with pytest.raises(BadMedia, match="it is no PNG, JPEG, WebP, GIF or BMP"):
        check_media("image", data)


def test_a_video_whose_pictures_are_all_lost() -> None:
    data = film("mp4")
    offset = data.index(b"stco") + 12  # of the first chunk of pictures, in the file
    assert int.from_bytes(data[offset : offset + 4], "big") == data.index(b"mdat") + 4
    with pytest.raises(BadMedia, match="breaks off before its first picture"):
        check_media("video", patched(data, (offset, len(data).to_bytes(4, "big"))))


def patched(data: bytes, *places: tuple[int, bytes]) -> bytes:
    made = bytearray(data)
    for at, value in places:
        made[at : at + len(value)] = value
    return bytes(made)


def frame_at() -> int:
    return picture("jpg").index(b"\xff\xc0") + 5


TOO_LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "png": (lambda: png(1 << 31, 1), "2147483648 x 1 pixels"),
    "png of nothing": (lambda: png(1, 0), "1 x 0 pixels"),
    "jpg": (lambda: patched(picture("jpg"), (frame_at(), b"\xff\xff\xff\xfe")), "65534 x 65535 pixels"),
    "gif": (lambda: patched(picture("gif"), (6, b"\x01\x40\x01\0")), "16385 x 1 pixels"),
    "bmp": (lambda: patched(picture("bmp"), (18, (1 << 30).to_bytes(4, "little"))), "1073741824 x 32 pixels"),
    "webp": (lambda: b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6, "16777216 x 16777216 pixels"),
    "webp lossless": (lambda: b"RIFF\x16\0\0\0WEBPVP8L\x0a\0\0\0\x2f\0\0\0\0" + bytes(5), ""),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_headers_declare_is_bounded(name: str) -> None:
    make, told = TOO_LARGE[name]
    if not told:
        assert check_media("image", make()) == "webp"  # of 1 x 1 pixel
        return
    with pytest.raises(BadMedia, match=f"its header declares {told}, 1 to {MAX_SIDE} a side are taken; resize it"):
        check_media("image", make())


@pytest.mark.parametrize("header", [png(48, 32)[:20] + b"\x01" + png(48, 32)[21:], b"\xff\xd8\xff" + b"\xff" * 300_000])
def test_headers_that_contradict_themselves(header: bytes) -> None:
    with pytest.raises(BadMedia, match=r"the header of the (png|jpg) is damaged"):
        check_media("image", header)


def test_the_size_of_a_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LIMITS == {"image": 64 << 20, "video": 512 << 20}
    monkeypatch.setitem(LIMITS, "image", 1 << 20)
    with pytest.raises(BadMedia, match="it has 2 MiB, at most 1 are taken"):
        check_media("image", bytes(2 << 20))
    for kind in media.KINDS:
        with pytest.raises(BadMedia, match="the file is empty"):
            check_media(kind, b"")


def test_sound_alone_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        track = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux([*track.encode(frame), *track.encode(None)])
    with pytest.raises(BadMedia, match="no video track is found in it"):
        check_media("video", buffer.getvalue())


def test_a_live_recording_does_not_say_how_long_it_lasts() -> None:
    with pytest.raises(BadMedia, match=r"it does not say how long it lasts.*ffmpeg -i INPUT -c copy"):
        check_media("video", film("webm", live="1"))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_files_pass_or_have_a_reason(data: st.DataObject) -> None:
    kind: MediaKind = data.draw(st.sampled_from(media.KINDS))
    good = picture(data.draw(st.sampled_from([*PICTURES, "gif"]))) if kind == "image" else film("mp4")
    places = data.draw(
        st.lists(st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=4)), max_size=4)
    )
    damaged = patched(good, *places)[: data.draw(st.integers(0, len(good) + 4))]
    reason, suffix = "", ""
    try:
        suffix = check_media(kind, damaged)
    except BadMedia as error:
        reason = error.reason
    assert media.SUFFIXES.get(suffix) == kind or (";" in reason and "\n" not in reason)


# ---- from a manifest into the shard and back ------------------------------------------------------------------------


def both(folder: Path) -> str:
    """Three recordings: one with a picture and a video, one with neither, one with a picture."""
    rows: list[dict[str, Any]] = [
        {"audio": "a.wav", "text": "one", "image": "pics/a.anything", "video": "films/a"},
        {"audio": "b.wav", "text": "two"},
        {"audio": "c.wav", "text": "three", "image": {"path": "pics/c.jpeg"}},
    ]
    files = {f"{name}.wav": tone(0.2, 200 + 30 * at) for at, name in enumerate("abc")}
    files |= {"pics/a.anything": picture("png"), "pics/c.jpeg": picture("jpg"), "films/a": film("mp4")}
    return fill(folder, files | {"manifest.jsonl": jsonl(*rows)})


def test_a_picture_and_a_video_travel_byte_for_byte(tmp_path: Path) -> None:
    root, rows, rejects = whole(both(tmp_path / "in"), tmp_path / "lake")
    assert rejects == []
    with tarfile.open(f"{root}/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(members) == ["a.flac", "a.json", "a.png", "a.mp4", "b.flac", "b.json", "c.flac", "c.json", "c.jpg"]
    assert (members["a.png"], members["a.mp4"], members["c.jpg"]) == (picture("png"), film("mp4"), picture("jpg"))
    assert b"png" not in members["a.json"]
    first, second, third = rows
    reader = ShardReader(root)
    assert reader.media(first, "image") == picture("png")
    assert reader.media(first, "video") == film("mp4")
    assert reader.media(third, "image") == picture("jpg")
    assert (first["image"]["suffix"], first["image"]["digest"]) == ("png", digest_bytes(picture("png")))
    assert (second["image"], second["video"], third["video"]) == (None, None, None)
    with pytest.raises(LookupError, match="clip b has no image"):
        reader.media(second, "image")
    assert [len(reader.waveform(row)) for row in rows] == [3200] * 3
    assert reader.clip(third).text == "three"
    with pytest.raises(ValueError, match="its image is not what the index says"):
        reader.media(third | {"image": third["image"] | {"offset": third["image"]["offset"] - 1}}, "image")


def test_the_same_input_gives_the_same_bytes_and_another_picture_another_version(tmp_path: Path) -> None:
    data = both(tmp_path / "in")
    shards = [whole(data, tmp_path / f"lake{number}")[0] + "/shard-000000.tar" for number in range(2)]
    assert Path(shards[0]).read_bytes() == Path(shards[1]).read_bytes()

    def digest() -> str:
        (group,) = plan_groups(read_sources(data)[0])
        return group_digest(group, data, Ingest())

    before = digest()
    fill(tmp_path / "in", {"pics/c.jpeg": picture("jpg", seed=1)})
    assert digest() != before


def test_recordings_without_media_keep_their_identity(tmp_path: Path) -> None:
    data = both(tmp_path / "in")
    one, plain, _ = read_sources(data)[0]
    noted = plain.annotation.model_dump(mode="json")
    assert identity_of(plain, data) == ["b.wav", plain.digest, [0.0, None, None], noted]
    named = [["image", "pics/a.anything", None, one.media[0].digest], ["video", "films/a", None, one.media[1].digest]]
    assert identity_of(one, data)[4:] == named


def test_what_does_not_pass_is_set_aside_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "wide.png": (png(1 << 31, 1), "media", "its image: its header declares 2147483648 x 1 pixels"),
        "text.jpg": (b"no picture at all\n", "media", "its image: this is plain text, not an image"),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "media", "its image: this is a Git LFS pointer"),
        "cut.mp4": (film("mp4")[:800], "media", "its video: the video breaks off: 328 bytes"),
        "large.gif": (picture("gif") + bytes(1 << 20), "media", "its image: it has 1 MiB, at most 0 are taken"),
        "gone.png": (b"", "read", "its image gone.png: the file is missing"),
    }
    rows: list[dict[str, Any]] = [
        {"audio": "a.wav", "id": name, "video" if name.endswith("mp4") else "image": name} for name in sorted(broken)
    ]
    files = {name: data for name, (data, _, _) in broken.items() if data}
    data = fill(tmp_path / "in", files | {"a.wav": tone(0.2, 200), "manifest.jsonl": jsonl({"audio": "a.wav"}, *rows)})
    monkeypatch.setitem(LIMITS, "image", 1 << 19)
    _, kept, rejects = whole(data, tmp_path / "lake")
    assert [row["id"] for row in kept] == ["a"]
    found = {reject.id: reject for reject in rejects}
    assert sorted(found) == sorted(broken)
    for name, (_, step, reason) in broken.items():
        assert (found[name].step, found[name].original) == (step, "a.wav")
        assert found[name].reason.startswith(reason), found[name].reason


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "out": ({"audio": "a.wav", "image": "../secret.png"}, "its image: the path leads out of the data folder"),
    "deep": ({"audio": "a.wav", "video": "x/../../secret.mp4"}, "its video: the path leads out of the data folder"),
    "absolute": ({"audio": "a.wav", "image": "/etc/passwd"}, "its image: the path leads out of the data folder"),
    "address": ({"audio": "a.wav", "image": "http://x/y.png"}, "its image: the path leads out of the data folder"),
    "zero": ({"audio": "a.wav", "image": "a\0.png"}, "its image: the path holds characters that no file name can hold"),
    "several": ({"audio": "a.wav", "image": ["a.png", "b.png"]}, "the field image is a JSON list; name one file"),
    "silent": ({"image": "a.png", "video": "a.mp4"}, "the row names its image and video but no audio; name the file"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_refused_before_any_file_is_opened(name: str, tmp_path: Path) -> None:
    row, reason = ROWS[name]
    good = {"audio": "b.wav", "image": "", "video": None}
    fill(tmp_path, {"secret.png": picture("png"), "secret.mp4": film("mp4")})
    files = {"a.wav": tone(0.2, 200), "b.wav": tone(0.2, 250), "manifest.jsonl": jsonl(row, good)}
    recordings, rejects = read_sources(fill(tmp_path / "in", files))
    assert [(one.annotation.id, one.media) for one in recordings] == [("b", ())]
    assert len(rejects) == 1 and rejects[0].reason.startswith(reason)


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.tsv"])
def test_tables_name_media_too(name: str, tmp_path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t" if name.endswith("tsv") else ",")
    writer.writerows([["audio", "image", "video"], ["a.wav", "a.png", "a.webm"], ["b.wav", "", ""]])
    files = {"a.png": picture("png"), "a.webm": film("webm"), name: buffer.getvalue().encode()}
    files |= {"a.wav": tone(0.2, 200), "b.wav": tone(0.2, 250)}
    recordings, rejects = read_sources(fill(tmp_path, files))
    assert rejects == []
    assert [[(one.kind, Path(one.url).name, one.digest) for one in it.media] for it in recordings] == [
        [("image", "a.png", digest_of(picture("png"))), ("video", "a.webm", digest_of(film("webm")))],
        [],
    ]


def test_one_sound_may_have_several_pictures(tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "image": name} for name in ("a.png", "b.jpg", "a.png")]
    files = {"a.wav": tone(0.2, 200), "a.png": picture("png"), "b.jpg": picture("jpg"), "manifest.jsonl": jsonl(*rows)}
    recordings, rejects = read_sources(fill(tmp_path, files))
    assert [one.annotation.id for one in recordings] == ["a", "a-2"]
    assert [reject.reason for reject in rejects] == ["the row repeats an earlier one; remove it"]


# ---- clips that are parts -------------------------------------------------------------------------------------------


def ingested(recordings: list[Recording], data: str, root: str, steps: Ingest) -> Rows:
    (group,) = plan_groups(recordings)
    ingest_group(0, group, root, data, steps)
    part = finished_part(root, 0, group_digest(group, data, steps))
    assert part is not None and part.rejects == ()
    return Rows(to_table([row.model_dump() for row in part.rows]))


def test_a_picture_goes_with_each_piece_and_a_video_with_none(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"audio": "long.wav", "image": "a.png", "video": "a.mp4"},
        {"audio": "part.wav", "offset": 0.1, "duration": 0.2, "image": "a.png", "video": "a.mp4"},
        {"audio": "short.wav", "image": "a.png", "video": "a.mp4"},
    ]
    files = {"long.wav": tone(2.5, 200), "part.wav": tone(0.5, 300), "short.wav": tone(0.5, 250)}
    files |= {"a.png": picture("png"), "a.mp4": film("mp4"), "manifest.jsonl": jsonl(*rows)}
    data, root = fill(tmp_path / "in", files), str(tmp_path / "lake/audio/cut/v1")
    clips = ingested(read_sources(data)[0], data, root, Ingest(cut="pauses", longest=1.0))
    pieces = len(clips) - 2
    names = [row["id"].partition("@")[0] for row in clips]
    assert names == ["long"] * pieces + ["part", "short"] and pieces > 2
    assert [row["marks"] for row in clips] == [[NO_VIDEO]] * (pieces + 1) + [[]]
    reader = ShardReader(root)
    assert {reader.media(row, "image") for row in clips} == {picture("png")}
    assert [row["video"] is not None for row in clips] == [False] * (pieces + 1) + [True]
    assert reader.media(clips[-1], "video") == film("mp4")


def test_a_trusted_flac_keeps_its_media(tmp_path: Path) -> None:
    files = {"a.flac": tone(0.5, 200, form="FLAC"), "a.png": picture("png"), "a.mp4": film("mp4")}
    files["manifest.jsonl"] = jsonl({"audio": "a.flac", "image": "a.png", "video": "a.mp4"})
    data, root = fill(tmp_path / "in", files), str(tmp_path / "lake/audio/trusted/v1")
    (clip,) = ingested(read_sources(data)[0], data, root, Ingest(trust=True))
    reader = ShardReader(root)
    assert clip["audio_digest"].startswith("md5:")
    assert (reader.media(clip, "image"), reader.media(clip, "video")) == (picture("png"), film("mp4"))


# ---- tars of samples ------------------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_tar_with_pictures_and_videos_beside_audio(tmp_path: Path) -> None:
    flac = tone(0.2, 200, form="FLAC")
    made = tar_of(
        {
            "x/a.jpg": picture("jpg"),
            "x/a.flac": flac,
            "x/a.json": b'{"text": "one"}',
            "x/b.mp4": film("mp4"),
            "x/b.wav": tone(0.2, 250),
            "x/c.flac": tone(0.2, 300, form="FLAC"),
            "x/d.png": picture("png"),
            "x/e.flac": tone(0.2, 350, form="FLAC"),
            "x/e.gif": picture("gif"),
            "x/e.PNG": picture("png"),
            "x/f.flac": tone(0.2, 400, form="FLAC"),
            "x/f.jpg": b"no picture at all",
        }
    )
    root, rows, rejects = whole(fill(tmp_path / "in", {"train.tar": made}), tmp_path / "lake")
    assert [(row["id"], row["text"]) for row in rows] == [("x/a", "one"), ("x/b", None), ("x/c", None), ("x/e", None)]
    reader = ShardReader(root)
    assert reader.media(rows[0], "image") == picture("jpg")
    assert reader.media(rows[1], "video") == film("mp4")
    assert reader.media(rows[3], "image") == picture("gif")
    assert [(row["image"] or row["video"] or {}).get("suffix") for row in rows] == ["jpg", "mp4", None, "gif"]
    assert {(reject.id, reject.step, reject.reason) for reject in rejects} == {
        ("x/d", "read", "the sample has only an image or a video and no audio; add a member such as .flac or .wav"),
        ("x/e", "read", "the sample has image in e.gif already; make it a sample of its own"),
        ("x/f", "media", "its image: this is plain text, not an image; copy or download it again"),
    }
    with tarfile.open(f"{root}/shard-000000.tar") as tar:
        kept = tar.extractfile("x_a.flac")
        assert kept is not None and kept.read() == flac


def test_a_tar_on_a_store_and_a_manifest_on_one(tmp_path: Path) -> None:
    made = tar_of({"a.jpg": picture("jpg"), "a.flac": tone(0.2, 200, form="FLAC")})
    rows = jsonl({"audio": "a.wav", "image": "a.png"})
    files = {"seen/tar/train.tar": made, "seen/rows/a.wav": tone(0.2, 200), "seen/rows/a.png": picture("png")}
    for name, data in (files | {"seen/rows/manifest.jsonl": rows}).items():
        storage.write_bytes(f"memory://{name}", data)
    try:
        for name, suffix in (("tar", "jpg"), ("rows", "png")):
            root, clips, rejects = whole(f"memory://seen/{name}", tmp_path / name)
            assert (len(clips), rejects) == (1, [])
            assert ShardReader(root).media(clips[0], "image") == picture(suffix)
            assert clips[0]["image"]["digest"] == digest_bytes(picture(suffix))
    finally:
        for name in ("tar", "rows"):
            storage.remove_tree(f"memory://seen/{name}")
