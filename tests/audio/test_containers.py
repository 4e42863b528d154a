"""What PyAV decodes: every container with its own encoder, cut, damaged and hostile ones."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from contextlib import suppress
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from components.audio import containers
from components.audio.containers import DECODERS, read_container
from components.audio.decode import BadAudio, decode
from components.audio.sniff import ASF_HEADER, demuxer, refusal

av = pytest.importorskip("av")

# muxer, encoder, rate, channels; least signal-to-noise ratio of the decoded audio in dB. ADTS declares no delay.
FORMS: dict[str, tuple[str, str, int, int, float]] = {
    "m4a": ("ipod", "aac", 44_100, 1, 25.0),
    "m4a stereo": ("ipod", "aac", 48_000, 2, 25.0),
    "alac": ("ipod", "alac", 16_000, 1, 80.0),
    "mov": ("mov", "pcm_s16le", 16_000, 2, 80.0),
    "mp4 opus": ("mp4", "libopus", 48_000, 1, 25.0),
    "3gp": ("3gp", "libopencore_amrnb", 8_000, 1, 5.0),
    "adts": ("adts", "aac", 16_000, 1, 25.0),
    "webm": ("webm", "libopus", 48_000, 1, 25.0),
    "mkv aac": ("matroska", "aac", 22_050, 1, 25.0),
    "mkv flac": ("matroska", "flac", 16_000, 1, 80.0),
    "wma": ("asf", "wmav2", 44_100, 1, 3.0),
    "amr": ("amr", "libopencore_amrnb", 8_000, 1, 5.0),
    "caf": ("caf", "pcm_s16be", 16_000, 1, 80.0),
    "caf alac": ("caf", "alac", 44_100, 2, 80.0),
    "opus": ("ogg", "libopus", 48_000, 1, 25.0),
}


def tune(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """(frames, channels) float32: two tones under 3 kHz that swell, so that an offset in time would show."""
    at = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * at) * np.sin(3 * at) ** 2 + 0.1 * np.sin(2 * np.pi * (300 + 200 * at) * at)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@cache
def encoded(form: str, seconds: float = 1.0, pictures: bool = False) -> bytes:
    muxer, encoder, rate, channels, _ = FORMS[form]
    whole = np.rint(tune(seconds, rate, channels) * 32767).astype(np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer) as container:
        if pictures:
            film = container.add_stream("mpeg4", rate=10)
            film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        track = container.add_stream(encoder, rate=rate, layout="mono" if channels == 1 else "stereo")
        if pictures:
            for _ in range(round(10 * seconds)):
                container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
            container.mux(film.encode(None))
        track.bit_rate = {"libopencore_amrnb": 12_200, "wmav2": 128_000}.get(encoder, 64_000 * channels)
        resampler = av.AudioResampler(format=track.format, layout=track.layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(whole.reshape(1, -1), format="s16", layout=track.layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(track.encode(part))
        container.mux(track.encode(None))
    return buffer.getvalue()


LATE = {"adts": range(1024, 1025), "amr": range(30, 50), "3gp": range(-20, 0), "wma": range(-60, 60)}  # frames


def ratio(heard: np.ndarray, meant: np.ndarray, lags: range = range(1)) -> float:
    """Signal-to-noise ratio in dB, the first and last 50 ms left out: the best of a few lags in frames."""
    edge = len(meant) // 20
    inner = meant[edge : len(heard) - max(0, lags[-1]) - edge][: len(meant) - 2 * edge]
    errors = [float(((heard[edge + lag :][: len(inner)] - inner) ** 2).mean()) for lag in lags]
    return float(10 * np.log10((inner**2).mean() / (min(errors) + 1e-12)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_in_time_and_in_tune(form: str) -> None:
    _, _, rate, channels, least = FORMS[form]
    values, heard_rate = read_container(encoded(form))
    assert (heard_rate, values.shape[1], values.dtype) == (rate, channels, np.float32)
    assert -0.03 < len(values) / rate - 1.0 < (0.1 if form in LATE else 0.03)
    assert ratio(values[:, 0], tune(1.0, rate)[:, 0], LATE.get(form, range(1))) > least
    decoded = decode(encoded(form), "x")
    assert decoded.samples.dtype == np.float32 and np.abs(decoded.samples).max() <= 1.0
    assert abs(len(decoded.samples) - len(values) * 16_000 / rate) <= 1
    assert decoded.marks == (("downmixed from 2 channels",) if channels == 2 else ())


@pytest.mark.parametrize("form", ["mov", "mkv aac", "mp4 opus"])
def test_the_audio_track_of_a_video(form: str) -> None:
    muxer, _, rate, channels, least = FORMS[form]
    film = encoded(form, pictures=True)
    with av.open(io.BytesIO(film)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"], muxer
    values, _ = read_container(film)
    assert values.shape[1] == channels
    assert ratio(values[:, 0], tune(1.0, rate)[:, 0]) > least


@pytest.mark.parametrize("form", ["m4a stereo", "alac", "webm", "wma", "adts"])
def test_a_crop_is_the_slice_of_the_whole(form: str) -> None:
    data = encoded(form, 3.0)
    whole = decode(data, "x").samples
    for start, end in ((0.0, 1.0), (0.7, 1.6), (1.23457, 2.5)):
        crop = decode(data, "x", "mean", start, end - start).samples
        assert np.abs(crop - whole[round(start * 16_000) : round(end * 16_000)]).max() < 1e-3
    with pytest.raises(BadAudio, match=r"the crop ends at 9\.00 s"):
        decode(data, "x", "mean", 1.0, 8.0)


def test_ogg_opus_is_what_libsndfile_decodes() -> None:
    stereo = np.concatenate([tune(2.0, 48_000), 0.5 * tune(2.0, 48_000)[::-1]], axis=1)
    for sound in (tune(2.0, 48_000), stereo):
        buffer = io.BytesIO()
        sf.write(buffer, sound, 48_000, format="OGG", subtype="OPUS")
        expected, rate = sf.read(io.BytesIO(buffer.getvalue()), dtype="float32", always_2d=True)
        values, heard_rate = read_container(buffer.getvalue())
        assert rate == heard_rate and values.shape == expected.shape
        assert np.abs(values - expected).max() < 1e-6


def test_opus_speech_of_the_bad_folder_is_what_libsndfile_decodes(shared_data: Path) -> None:
    data = (shared_data / "bad" / "speech.opus").read_bytes()
    expected, _ = sf.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert np.abs(read_container(data)[0] - expected).max() < 1e-6


@pytest.mark.parametrize("form", ["m4a", "alac", "webm", "adts", "wma", "amr", "caf", "mkv flac"])
def test_a_file_that_breaks_off_is_refused_or_marked(form: str) -> None:
    data = encoded(form, 3.0)
    with pytest.raises(BadAudio):
        decode(data[: len(data) * 6 // 10 + 1], "x")


def test_what_is_not_on_the_lists_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        track = container.add_stream("adpcm_ima_qt", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.int16), format="s16p", layout="mono")
        frame.sample_rate = 16_000
        container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with pytest.raises(BadAudio, match="adpcm_ima_qt in mov is not read here"):
        decode(buffer.getvalue(), "x")
    assert not [name for name in DECODERS if "adpcm" in name or "g7" in name or "h264" in name]
    with pytest.raises(BadAudio, match="no audio track"):
        decode(film_only(), "x")


def film_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        film = container.add_stream("mpeg4", rate=10)
        film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            container.mux(film.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(film.encode(None))
    return buffer.getvalue()


PLAYLISTS = {
    "hls": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_no_playlist_and_no_picture_reaches_a_demuxer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demuxer(PLAYLISTS[kind]) is None
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(BadAudio):
        decode(PLAYLISTS[kind], "x")


def test_nothing_but_the_bytes_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(containers, "_refuse", lambda *what: asked.append(what))
    read_container(encoded("m4a"))
    assert asked == []
    monkeypatch.undo()
    with pytest.raises(BadAudio, match="refers to another file"):
        containers._refuse("file:/etc/passwd", 1, {})


# ---- hostile headers ------------------------------------------------------------------------------------------------


def with_table(kind: bytes, offset: int, value: int, form: str = "mov") -> bytes:
    """A file whose box `kind` declares another number: `offset` bytes after the four letters."""
    data = bytearray(encoded(form))
    at = data.rindex(kind) + offset
    data[at : at + 4] = struct.pack(">I", value)
    return bytes(data)


TABLES = [(b"stsz", 12), (b"stsz", 8), (b"stts", 12), (b"stts", 8), (b"stco", 8), (b"stsc", 16)]


@pytest.mark.parametrize("count", [1 << 20, 1 << 25, (1 << 32) - 1])
@pytest.mark.parametrize(
    "place", [(b"stsz", 12), (b"stsz", 8), (b"stts", 12), (b"stts", 8), (b"stco", 8), (b"stsc", 16)]
)
def test_a_table_that_lies_costs_neither_memory_nor_time(count: int, place: tuple[bytes, int]) -> None:
    for form in ("mov", "m4a"):
        data = with_table(*place, count, form)
        before, began = psutil.Process().memory_info().rss, time.process_time()
        with suppress(BadAudio):
            decode(data, "x")
        assert psutil.Process().memory_info().rss - before < 200 << 20
        assert time.process_time() - began < 2.0


@pytest.mark.parametrize("count", [1 << 20, 1 << 22, 1 << 28])
def test_tables_that_lie_together_cost_neither_memory_nor_time(count: int) -> None:
    data = bytearray(encoded("m4a"))
    for box, offset, values in ((b"stsz", 8, (1, count)), (b"stsc", 16, (count,)), (b"stts", 12, (count,))):
        at = data.rindex(box) + offset
        data[at : at + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    before, began = psutil.Process().memory_info().rss, time.process_time()
    with pytest.raises(BadAudio):
        decode(bytes(data), "x")
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert time.process_time() - began < 2.0


def test_a_flac_in_matroska_that_promises_2_to_the_40_samples_costs_no_memory() -> None:
    data = bytearray(encoded("mkv flac"))
    at = data.index(b"fLaC") + 21
    data[at : at + 5] = bytes([data[at] | 0x0F, 255, 255, 255, 255])
    tracemalloc.start()
    with suppress(BadAudio):
        decode(bytes(data), "x")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def never_anything_but_bad_audio(data: bytes) -> None:
    began = time.process_time()
    with suppress(BadAudio):
        samples = decode(data, "x").samples
        assert np.isfinite(samples).all() and np.abs(samples).max() <= 1.0
    assert time.process_time() - began < 3.0


HEADS = (b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3", ASF_HEADER, b"#!AMR\n", b"caff")


@given(st.sampled_from([b"", *HEADS, b"\xff\xf1\x50\x80", b"OggS", b"fLaC"]), st.binary(max_size=600))
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_refused_or_decoded(head: bytes, rest: bytes) -> None:
    never_anything_but_bad_audio(head + rest)


WHOLE = ("m4a", "alac", "webm", "wma", "opus", "mkv flac", "amr", "adts", "caf")


def damaged(data: bytes, flips: list[tuple[float, int]], end: float) -> bytes:
    spoilt = bytearray(data)
    for place, bit in flips:
        spoilt[int(place * (len(spoilt) - 1))] ^= 1 << bit
    return bytes(spoilt[: max(1, int(end * len(spoilt)))])


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), max_size=8)
HEAD_FLIPS = st.lists(st.tuples(st.floats(0, 0.1) | st.floats(0.9, 1), st.integers(0, 7)), min_size=1, max_size=4)


@given(st.sampled_from(WHOLE), FLIPS | HEAD_FLIPS, st.just(1.0) | st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_flipped_bits_and_cuts_are_refused_or_decoded(form: str, flips: list[tuple[float, int]], end: float) -> None:
    never_anything_but_bad_audio(damaged(encoded(form), flips, end))


@pytest.mark.slow
@given(st.sampled_from(WHOLE), FLIPS | HEAD_FLIPS, st.just(1.0) | st.floats(0, 1))
@settings(max_examples=1500, deadline=None)
def test_many_flipped_bits_and_cuts(form: str, flips: list[tuple[float, int]], end: float) -> None:
    before = psutil.Process().memory_info().rss
    never_anything_but_bad_audio(damaged(encoded(form), flips, end))
    assert psutil.Process().memory_info().rss - before < 300 << 20


def test_what_is_still_refused_keeps_its_message() -> None:
    for magic, what in ((b"ajkg", "Shorten"), (b"MAC ", "Monkey's Audio"), (b"wvpk", "WavPack")):
        assert refusal(magic + bytes(100)) is not None and what in str(refusal(magic + bytes(100)))
