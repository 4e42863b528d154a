"""Any bytes at all: what is read becomes rows, members or samples, or a reason; never another exception, nor a bomb."""

from __future__ import annotations

import gzip
import io
import json
import posixpath
import re
import struct
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_containers import encoded
from test_corpora import WHOLE, C, cut, fill, harmless, lines

from components.audio.decode import BadAudio, Channels, decode
from components.audio.headers import fits
from components.audio.inside import read_inside
from components.audio.manifests import read_rows
from components.audio.tars import BadTar, members
from components.schema import SAMPLE_RATE, Annotation, Recording
from components.shards.group import Keyed, assign_keys
from components.shards.samples import make_samples
from components.shards.settings import Ingest

SHORT = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(SHORT, max_examples=400)
SECONDS = 3.0  # of CPU for one example; the largest input has 4 MB
MEMORY = 256 << 20  # bytes by which one example may raise the peak of memory

PEAKS = Path("/proc/self/clear_refs")


def _kilobytes(name: str) -> int:
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def bounded(work: Callable[[], object]) -> None:
    """Run `work` within SECONDS and MEMORY; peaks of memory are told by Linux alone."""
    linux = PEAKS.exists()
    if linux:
        PEAKS.write_text("5")
    before, began = _kilobytes("VmRSS") if linux else 0, time.process_time()
    work()
    assert time.process_time() - began < SECONDS
    assert not linux or (_kilobytes("VmHWM") - before) << 10 < MEMORY


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes, other: bytes) -> bytes:
    """`whole` with bits flipped, and a stretch of it taken out, written twice or replaced by one of `other`."""
    data = bytearray(whole)
    ends = st.floats(0, 0.05) | st.floats(0.95, 1) | st.floats(0, 1)  # heads and tails are where lengths stand
    for place, bit in draw(st.lists(st.tuples(ends, st.integers(0, 7)), max_size=6)):
        data[int(place * (len(data) - 1))] ^= 1 << bit
    begin, end = sorted(int(draw(ends) * len(data)) for _ in range(2))
    kind = draw(st.sampled_from(["whole", "whole", "cut", "out", "twice", "other"]))
    if kind == "cut":
        del data[end:]
    elif kind == "out":
        del data[begin:end]
    elif kind == "twice":
        data[begin:begin] = data[begin:end]
    elif kind == "other":
        data[begin:end] = other[int(draw(ends) * len(other)) :][: draw(st.integers(0, 2000))]
    return bytes(data)


# ---- manifests ------------------------------------------------------------------------------------------------------

ROWS = [{"audio": "a.wav", "text": "näht", "labels": {"n": 3}, "offset": 0.01, "duration": 0.02}, {"audio": "a.wav"}]
TABLE = 'audio,text,labels.n\na.wav,"one, ""two""",3\na.wav,\u0645\u0631\u062d\u0628\u0627,4\n'
MANIFESTS: dict[str, bytes] = {
    "manifest.jsonl": lines(*ROWS).encode(),
    "manifest.json": json.dumps({"data": ROWS}).encode(),
    "manifest.csv": TABLE.encode(),
    "metadata.csv": b"\xef\xbb\xbf" + TABLE.replace(",", ";").encode(),
    "manifest.tsv": TABLE.replace(",", "\t").encode("utf-16"),
    "manifest.jsonl.gz": gzip.compress(lines(*ROWS).encode()),
    "train_manifest.json": lines({"audio_filepath": "a.wav", "duration": 0.05, "offset": 0.0}).encode(),
    "cuts.jsonl": lines(cut("x", "a.wav"), cut("y", "a.wav")).encode(),
    "wav.scp": b"u1 a.wav\nu2 a.wav\n",
    "segments": b"s1 u1 0.0 0.02\ns2 u1 0.02 -1\n",
    "text": b"u1 hello there\nu2 \xd8\xb3\n",
    "utt2spk": b"u1 ann\nu2 bob\n",
    "state.json": b'{"_data_files": [{"filename": "x.arrow"}]}',
    "dataset_info.json": b'{"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}',
}


@st.composite
def manifest(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(MANIFESTS)))
    other = MANIFESTS[draw(st.sampled_from(sorted(MANIFESTS)))]
    return name, draw(spoilt(MANIFESTS[name], other) | st.binary(max_size=200))


def read_all(name: str, data: bytes) -> None:
    for row in read_rows(data, name):
        assert row.line >= 1 and (row.fault == "") == bool(row.fields or not row.fault)
        assert not re.search(r"\w+Error\(", row.fault)


def in_a_folder(folder: Path, name: str, data: bytes) -> None:
    """The manifest beside what its kind needs."""
    around: dict[str, bytes | str] = {"a.wav": C}
    if name in ("segments", "text", "utt2spk"):
        around["wav.scp"] = MANIFESTS["wav.scp"]
    if name in ("state.json", "dataset_info.json"):
        around["x.arrow"] = WHOLE["x.arrow"]
    fill(folder, around)
    bounded(lambda: harmless(folder, name, data))


@SHORT
@given(made=manifest())
def test_any_manifest_is_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, made: tuple[str, bytes]) -> None:
    read_all(*made)
    in_a_folder(tmp_path_factory.mktemp("fuzz"), *made)


@pytest.mark.slow
@LONG
@given(made=manifest())
def test_many_manifests(tmp_path_factory: pytest.TempPathFactory, made: tuple[str, bytes]) -> None:
    read_all(*made)
    in_a_folder(tmp_path_factory.mktemp("fuzz"), *made)


REPEATED = st.text(alphabet='",;\t|a \r\n{}[]\\', min_size=1, max_size=10)
NAMES = st.sampled_from(["m.csv", "m.tsv", "m.jsonl", "m.json"])


@SHORT
@given(name=NAMES, head=st.sampled_from(["", "audio,text\n", "audio\ttext\n"]), pattern=REPEATED)
def test_no_pattern_takes_the_square_of_its_length(name: str, head: str, pattern: str) -> None:
    bounded(lambda: read_all(name, (head + pattern * 2000).encode()))


@pytest.mark.slow
@settings(LONG, max_examples=150)
@given(name=NAMES, head=st.sampled_from(["", "audio,text\n", "audio\ttext\n"]), pattern=REPEATED)
def test_no_long_pattern_does(name: str, head: str, pattern: str) -> None:
    bounded(lambda: read_all(name, (head + pattern * 20_000).encode()))


@pytest.mark.parametrize("pattern", ['a","\n', '"\n', '"a', '""",\n', "a,\r", '",\r\n"'])
def test_a_table_of_open_quotes_takes_seconds(pattern: str) -> None:
    bounded(lambda: read_all("m.csv", b"audio,text\n" + pattern.encode() * 20_000))


# ---- tars -----------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 1 << 70).map(lambda size: b"\x80" + size.to_bytes(11, "big")) | st.binary(max_size=12)
OCTAL = st.integers(0, 3000).map(lambda size: b"%011o\0" % size)
KINDS = st.sampled_from([bytes([kind]) for kind in b"0\0123456gLKxXSVDM7"]) | st.binary(min_size=1, max_size=1)
PARTS = st.sampled_from(["..", "a", "b.wav", "", ".", "\u202e", "نمس", "C:", "x\\..", "a.json"])
TAR_NAMES = st.lists(PARTS, max_size=5).map("/".join).map(str.encode) | st.binary(max_size=100)
RECORD = st.tuples(st.sampled_from([b"path", b"size", b"GNU.sparse.map", b"linkpath"]), st.binary(max_size=20))


def block(name: bytes, size: bytes, kind: bytes, damage: int) -> bytes:
    """A ustar header with its checksum, which `damage` makes wrong."""
    head = bytearray(name[:100].ljust(100, b"\0") + b"0000644\0" * 3 + size[:12].ljust(12, b"\0") + b"0" * 11 + b"\0")
    head += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    head[148:156] = b"%06o\0 " % ((sum(head) + damage) % (1 << 18))
    return bytes(head)


def extended(record: tuple[bytes, bytes]) -> bytes:
    body = record[0] + b"=" + record[1] + b"\n"
    return next(b"%d %s" % (n, body) for n in range(len(body) + 2, len(body) + 9) if len(b"%d %s" % (n, body)) == n)


@st.composite
def tar(draw: st.DrawFn) -> bytes:
    """Headers of any kind that follow one another, each with some data behind it."""
    made = b""
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(KINDS)
        data = draw(
            st.binary(max_size=600) | st.lists(RECORD, max_size=3).map(lambda some: b"".join(map(extended, some)))
        )
        size = draw(st.just(b"%011o\0" % len(data)) | OCTAL | NUMBERS)
        made += block(draw(TAR_NAMES), size, kind, draw(st.sampled_from([0, 0, 0, 0, 1])))
        made += data + bytes(-len(data) % tarfile.BLOCKSIZE)
    return made[: draw(st.just(len(made)) | st.integers(0, len(made)))] + bytes(draw(st.sampled_from([0, 1024])))


def check_members(data: bytes) -> None:
    """What is taken of a tar lies in it, one behind the other, under names below its folder."""
    last = 0
    with suppress(BadTar):
        for member in members(io.BytesIO(data), len(data)):
            assert member.offset >= last + tarfile.BLOCKSIZE and 0 <= member.size <= len(data) - member.offset
            last = member.offset + member.size
            if not member.fault:
                member.name.encode()
                assert posixpath.join("/tar", member.name).startswith("/tar")
                assert (posixpath.normpath(f"/tar/{member.name}") + "/").startswith("/tar/")


@settings(SHORT, max_examples=40)
@given(data=tar())
def test_any_tar_stays_within_itself(data: bytes) -> None:
    bounded(lambda: check_members(data))


CONTAINERS = st.sampled_from(sorted(WHOLE))


@pytest.mark.slow
@LONG
@given(data=tar(), name=CONTAINERS, other=CONTAINERS, draw=st.data())
def test_many_containers(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, other: str, draw: st.DataObject
) -> None:
    check_members(data)
    folder = Path(fill(tmp_path_factory.mktemp("fuzz"), {"a.wav": C, "y.tar": data}))
    bounded(lambda: harmless(folder, name, draw.draw(spoilt(WHOLE[name], WHOLE[other]))))


PLACES = st.builds("{} {} {}".format, st.sampled_from(["bytes", "row", "file"]), st.integers(0, 1 << 70), st.text())


@SHORT
@given(inside=PLACES | st.text(max_size=20), name=CONTAINERS)
def test_any_place_in_a_container(tmp_path_factory: pytest.TempPathFactory, inside: str, name: str) -> None:
    folder = fill(tmp_path_factory.mktemp("fuzz"), {name: WHOLE[name]})
    with suppress(BadAudio):
        assert len(read_inside(f"{folder}/{name}", inside)) <= len(WHOLE[name])


# ---- audio ----------------------------------------------------------------------------------------------------------

FILES = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "NIST", "W64", "RF64")
FILMS = ("m4a", "webm", "opus", "adts", "caf", "wma")


@cache
def sound(form: str) -> bytes:
    if form in FILMS:
        return encoded(form, 0.5)
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(2 * np.pi * 300 * time) * np.sin(9 * time) ** 2, SAMPLE_RATE, format=form)
    return buffer.getvalue()


FORMS = st.sampled_from(FILES + FILMS)
CROPS = st.sampled_from([(0.0, None), (0.1, 0.2), (0.3, None), (3000.0, 1.0)])
CHANNELS = st.sampled_from(["mean", "loudest", "first"])


def samples_or_reason(data: bytes, crop: tuple[float, float | None], channels: Channels) -> None:
    samples, reason = np.zeros(1, np.float32), ""
    try:
        samples = decode(data, "x", channels, *crop).samples
    except BadAudio as error:
        reason = error.reason
    assert reason == "" or (re.search(r"[;:]", reason) and not re.search(r"\b\w+(Error|Exception)\b", reason))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert np.isfinite(samples).all() and np.abs(samples).max() <= 1.0


def clips_or_reason(data: bytes) -> None:
    """The same through the step that trusts headers."""
    recording = Recording(url="/x", digest="0", annotation=Annotation(id="x"))
    with suppress(BadAudio):
        for item in make_samples(Keyed("x", recording), data, "x", Ingest(trust=True)):
            assert item
    fits(data)


def refused_or_decoded(data: bytes, crop: tuple[float, float | None], channels: Channels) -> None:
    bounded(lambda: samples_or_reason(data, crop, channels))
    bounded(lambda: clips_or_reason(data))


@SHORT
@given(form=FORMS, other=FORMS, draw=st.data(), crop=CROPS, channels=CHANNELS)
def test_spoilt_audio_is_refused_or_decoded(
    form: str, other: str, draw: st.DataObject, crop: tuple[float, float | None], channels: Channels
) -> None:
    refused_or_decoded(draw.draw(spoilt(sound(form), sound(other))), crop, channels)


@pytest.mark.slow
@settings(LONG, max_examples=1500)
@given(form=FORMS, other=FORMS, draw=st.data(), crop=CROPS, channels=CHANNELS)
def test_much_spoilt_audio(
    form: str, other: str, draw: st.DataObject, crop: tuple[float, float | None], channels: Channels
) -> None:
    refused_or_decoded(draw.draw(spoilt(sound(form), sound(other))), crop, channels)


WORDS = st.integers(0, (1 << 16) - 1) | st.sampled_from([0, 1, 2, 3, 6, 7, 16, 24, 0x55, 0xFFFE])
LONGS = st.integers(0, (1 << 32) - 1) | st.sampled_from([0, 1, 8000, 16_000, 1 << 31, (1 << 32) - 1])


@SHORT
@given(code=WORDS, channels=WORDS, rate=LONGS, bytes_a_second=LONGS, align=WORDS, bits=WORDS, size=LONGS)
def test_any_wav_header(
    code: int, channels: int, rate: int, bytes_a_second: int, align: int, bits: int, size: int
) -> None:
    form = struct.pack("<HHIIHH", code, channels, rate, bytes_a_second, align, bits)
    head = b"RIFF" + struct.pack("<I", size) + b"WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size)
    bounded(lambda: samples_or_reason(head + sound("WAV")[44:], (0.0, None), "mean"))


@SHORT
@given(rate=st.integers(0, (1 << 20) - 1), channels=st.integers(0, 7), bits=st.integers(0, 31), draw=st.data())
def test_any_flac_header(rate: int, channels: int, bits: int, draw: st.DataObject) -> None:
    frames = draw.draw(st.integers(0, (1 << 36) - 1) | st.sampled_from([0, 1, 8000, 57_600_000]))
    flac, packed = sound("FLAC"), rate << 44 | channels << 41 | bits << 36 | frames
    data = flac[:18] + packed.to_bytes(8, "big") + flac[26:]
    bounded(lambda: samples_or_reason(data, (0.0, None), "mean"))
    bounded(lambda: clips_or_reason(data))


# ---- names ----------------------------------------------------------------------------------------------------------


@SHORT
@given(ids=st.lists(st.text() | st.sampled_from(["a", "A", "a--0001", "a--00012", "é", "e\u0301"]), unique=True))
def test_any_ids_get_keys_of_their_own(ids: list[str]) -> None:
    """Also where a recording is cut into pieces, whose keys have a number behind."""
    keys = assign_keys([Recording(url="/x", digest="0", annotation=Annotation(id=name)) for name in ids])
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", key) for key in keys)
    pieces = [f"{key}--{number:04d}" for key in keys for number in (1, 12, 12_345)]
    assert len({key.lower() for key in keys + pieces}) == len(keys) + len(pieces)
