"""Every awkward file ends as samples with a mark or as one sentence of reason; none ends the run."""

from __future__ import annotations

import copy
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from audio_helpers import voice, written

from components.audio.decode import BadAudio, Decoded, decode
from components.audio.encode import to_flac, to_int16

# What must become of each file of ../shared/data/bad: (seconds, marks) or a piece of the reason.
BAD_FOLDER: dict[str, tuple[float, tuple[str, ...]] | str] = {
    "truncated.flac": "damaged or cut off",
    "zero_byte.wav": "empty (0 bytes)",
    "text_renamed.wav": "plain text, not audio",
    "html_error_page.flac": "web page",
    "eight_channel.wav": (2.0, ("downmixed from 8 channels",)),
    "nan_inf_float.wav": (2.0, ("102 non-finite samples set to 0",)),
    "loud_float.wav": (2.0, ("scaled down from peak 22.1",)),
    "very_short.wav": "lasts 0.6 ms, less than 50 ms",
    "one_sample.flac": "lasts 0.1 ms, less than 50 ms",
    "header_only.wav": "holds no audio",
    "silent.wav": (2.0, ("silent",)),
    "dc_offset.wav": (2.0, ("constant offset removed", "silent")),
    "mulaw_8k.wav": (2.0, ()),
    "alaw_8k.wav": (3.0, ()),
    "speech.mp3": (3.0, ("downmixed from 2 channels",)),
    "speech.m4a": (3.0, ()),
    "speech.opus": (3.0, ()),
    "mp3_renamed.wav": (3.0, ()),
    "corrupted_header.flac": "FLAC header is damaged",
    "corrupted_header.wav": "WAV header is damaged",
    "zero_channels.wav": "declares 0 channels",
    "zero_sample_rate.wav": "a sample rate of 0 Hz",
    "huge_declared_length.wav": (1.0, ("header declares more audio than there is",)),
    "corrupted_middle.flac": "damaged or cut off",
    "rate_192k.wav": (1.0, ()),
    "rate_odd_11127.flac": (16000 / 11127, ()),
    "int24.wav": (1.0, ()),
    "float64.wav": (1.0, ()),
    "clipped.wav": (2.0, ("clipped",)),
    "stereo_opposite_phase.wav": (2.0, ("channels in opposite phase: kept channel 1",)),
    "name with spaces and ünïcode.wav": (1.0, ()),
}


def flac_declaring(frames: int) -> bytes:
    """One second of FLAC whose STREAMINFO declares another number of frames."""
    data = bytearray(written(voice(), form="FLAC"))
    packed = int.from_bytes(data[18:26], "big") >> 36 << 36 | frames
    data[18:26] = packed.to_bytes(8, "big")
    return bytes(data)


def wav_with(offset: int, code: str, value: int) -> bytes:
    """One second of WAV with one field of its 44-byte header overwritten."""
    data = bytearray(written(voice()))
    struct.pack_into(code, data, offset, value)
    return bytes(data)


def garbled(form: str) -> bytes:
    data = bytearray(written(voice(3.0), form=form))
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(1).bytes(4000)
    return bytes(data)


def stereo(left: np.ndarray, right: np.ndarray) -> bytes:
    return written(np.stack([left, right], axis=1))


def spoilt(count: int) -> bytes:
    samples = voice()
    samples[100 : 100 + count : 2] = np.nan
    samples[101 : 100 + count : 2] = -np.inf
    return written(samples, subtype="FLOAT")


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty (0 bytes)"),
    "text": (lambda: b"This is a note about a recording.\n" * 20, "plain text"),
    "russian text": (lambda: "Привет, мир. ".encode() * 50, "plain text"),
    "utf-16 text": (lambda: ("hello there " * 20).encode("utf-16"), "plain text"),
    "web page": (lambda: b"<!DOCTYPE html><html>404</html>", "web page"),
    "json": (lambda: b'{"error": "not found"}', "JSON text"),
    "lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zeros": (lambda: bytes(9000), "only zero bytes"),
    "noise": (lambda: np.random.default_rng(2).bytes(9000), "not recognised"),
    "m4a without audio": (lambda: b"\0\0\0\x20ftypM4A " + bytes(100), "convert it to WAV or FLAC"),
    "webm without audio": (lambda: b"\x1aE\xdf\xa3" + bytes(100), "convert it to WAV or FLAC"),
    "adts without audio": (lambda: b"\xff\xf1\x50\x80" + bytes(100), "holds no audio"),
    "wavpack": (lambda: b"wvpk" + bytes(100), "WavPack is not read here"),
    "zip": (lambda: b"PK\x03\x04" + bytes(100), "unpack it"),
    "adpcm": (lambda: written(voice(), subtype="IMA_ADPCM"), "WAV with ADPCM is not read"),
    "gsm": (lambda: written(voice(), subtype="GSM610"), "GSM 6.10 is not read"),
    "voc": (lambda: written(voice(), form="VOC"), "VOC with PCM_16 is not read"),
    "header only": (lambda: written(voice()[:0]), "holds no audio"),
    "ten samples": (lambda: written(voice()[:10]), "lasts 0.6 ms"),
    "one sample of flac": (lambda: written(voice()[:1], form="FLAC"), "lasts 0.1 ms"),
    "cut flac": (lambda: written(voice(3.0), form="FLAC")[:20_000], "cut off"),
    "garbage in flac": (lambda: garbled("FLAC"), "damaged or cut off"),
    "flac without header": (lambda: b"fLaC\0\0\0\x22" + bytes(34) + b"\xff\xf8" * 200, "FLAC header is damaged"),
    "flac stub": (lambda: b"fLaC\0\0\0", "FLAC header is damaged"),
    "flac that promises double": (lambda: flac_declaring(32_000), "breaks off after 1.00 s of 2.00 s"),
    "flac that promises 49 days": (lambda: flac_declaring((1 << 36) - 1), "71583 minutes are too many"),
    "cut wav": (lambda: written(voice())[:20_000], "12,044 bytes of what the header declares are missing"),
    "wav of 0 channels": (lambda: wav_with(22, "<H", 0), "declares 0 channels"),
    "wav of 0 Hz": (lambda: wav_with(24, "<I", 0), "a sample rate of 0 Hz"),
    "wav of 1 Hz": (lambda: wav_with(24, "<I", 1), "outside 4000 to 384000 Hz"),
    "wav of 60,000 channels": (lambda: wav_with(22, "<H", 60_000), ""),
    "wav of no known code": (lambda: wav_with(20, "<H", 0xC9C8), "unknown format code 51656"),
    "riff without fmt": (lambda: b"RIFF\x24\0\0\0WAVE" + bytes(200), "no usable fmt chunk"),
    "33 channels": (lambda: written(np.zeros((4000, 33), np.float32)), "at most 32"),
    "nothing but nan": (lambda: spoilt(16_000), "not numbers"),
    "one glitch": (
        lambda: written(np.where(np.arange(16_000) == 500, 1e20, 0.1 * voice()), subtype="DOUBLE"),
        "single samples reach 1e+20",
    ),
    "cut ogg": (lambda: written(voice(), form="OGG")[:5_000], "breaks off at its start"),
}

USED: dict[str, tuple[Callable[[], bytes], float, tuple[str, ...]]] = {
    "declares 2 GB": (lambda: wav_with(40, "<I", 0x7FFFFF00), 1.0, ("header declares more audio than there is",)),
    "declares 4 GB": (lambda: wav_with(40, "<I", 0xFFFFFFFF), 1.0, ("header declares more audio than there is",)),
    "flac from a pipe": (lambda: flac_declaring(0), 1.0, ()),
    "silence": (lambda: written(np.zeros(8000, np.float32)), 0.5, ("silent",)),
    "constant": (lambda: written(np.full(8000, 0.6)), 0.5, ("constant offset removed", "silent")),
    "offset": (lambda: written(voice() + 0.2), 1.0, ("constant offset removed",)),
    "clipped": (lambda: written(np.clip(9 * voice(), -1, 1)), 1.0, ("clipped",)),
    "loud float": (
        lambda: written(voice() / np.abs(voice()).max() * 40, subtype="FLOAT"),
        1.0,
        ("scaled down from peak 40.0",),
    ),
    "100 not finite": (lambda: spoilt(100), 1.0, ("100 non-finite samples set to 0",)),
    "opposite": (lambda: stereo(voice(), -voice()), 1.0, ("channels in opposite phase: kept channel 1",)),
    "opposite, right louder": (
        lambda: stereo(-0.9 * voice(), voice()),
        1.0,
        ("channels in opposite phase: kept channel 2",),
    ),
    "one dead channel": (lambda: stereo(voice(), 0 * voice()), 1.0, ("downmixed from 2 channels",)),
    "8 channels": (lambda: written(np.stack([voice()] * 8, axis=1)), 1.0, ("downmixed from 8 channels",)),
    "odd rate": (lambda: written(voice(1.0, 11_127), 11_127), 1.0, ()),
    "192 kHz": (lambda: written(voice(1.0, 192_000), 192_000), 1.0, ()),
    "mu-law": (lambda: written(voice(1.0, 8000), 8000, subtype="ULAW"), 1.0, ()),
    "A-law": (lambda: written(voice(1.0, 8000), 8000, subtype="ALAW"), 1.0, ()),
    "8 bit": (lambda: written(voice(), subtype="PCM_U8"), 1.0, ()),
    "24 bit": (lambda: written(voice(), subtype="PCM_24"), 1.0, ()),
    "32 bit": (lambda: written(voice(), subtype="PCM_32"), 1.0, ()),
    "double": (lambda: written(voice(), subtype="DOUBLE"), 1.0, ()),
    "24-bit flac": (lambda: written(voice(), form="FLAC", subtype="PCM_24"), 1.0, ()),
    "vorbis": (lambda: written(voice(), form="OGG", subtype="VORBIS"), 1.0, ()),
    "opus": (lambda: written(voice(), form="OGG", subtype="OPUS"), 1.0, ()),
    "mp3": (lambda: written(voice(), form="MP3"), 1.0, ()),
    "nist": (lambda: written(voice(), form="NIST"), 1.0, ()),
    "aiff": (lambda: written(voice(), form="AIFF"), 1.0, ()),
    "extra chunk": (lambda: written(voice()) + b"LIST\x10\0\0\0" + bytes(16), 1.0, ()),
}


def check_promises(decoded: Decoded) -> None:
    samples = decoded.samples
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert samples.flags.c_contiguous
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() <= 1.0


@pytest.mark.parametrize("name", BAD_FOLDER)
def test_each_file_of_the_bad_folder(shared_data: Path, name: str) -> None:
    expected = BAD_FOLDER[name]
    data = (shared_data / "bad" / name).read_bytes()
    if isinstance(expected, str):
        with pytest.raises(BadAudio) as caught:
            decode(data, name)
        assert expected in caught.value.reason
        return
    decoded = decode(data, name)
    check_promises(decoded)
    assert abs(len(decoded.samples) - expected[0] * 16_000) <= 1
    assert decoded.marks == expected[1]


def test_the_table_names_every_file_of_the_bad_folder(shared_data: Path) -> None:
    there = {path.name for path in (shared_data / "bad").iterdir()} - {"README.md", "manifest.jsonl"}
    assert there == set(BAD_FOLDER)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why_in_one_sentence(case: str) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(BadAudio) as caught:
        decode(make(), "folder/x.wav")
    reason = caught.value.reason
    assert expected in reason
    assert reason == str(caught.value)
    assert "\n" not in reason
    assert not reason.endswith(".")
    assert ";" in reason  # what is wrong; what to do
    assert len(reason) < 220
    assert caught.value.__notes__ == ["in folder/x.wav"]


@pytest.mark.parametrize("case", USED)
def test_what_is_used_is_mono_16_khz_and_marked(case: str) -> None:
    make, seconds, marks = USED[case]
    decoded = decode(make(), "x.wav")
    check_promises(decoded)
    assert abs(len(decoded.samples) - seconds * 16_000) <= 1
    assert decoded.marks == marks


def test_16_bit_samples_come_back_exactly() -> None:
    values = np.random.default_rng(3).integers(-20_000, 20_000, 16_000, dtype=np.int16)
    for form in ("WAV", "FLAC"):
        decoded = decode(written(values, form=form), "x")
        assert np.array_equal(to_int16(decoded.samples), values)
        again = decode(to_flac(decoded.samples), "x")
        assert np.array_equal(again.samples, decoded.samples)


def test_an_opposite_pair_keeps_its_speech_and_a_scaled_clip_its_shape() -> None:
    kept = decode(stereo(voice(), -voice()), "x").samples
    assert np.abs(kept - voice()).max() < 1e-4
    loud = decode(written(40 * voice(), subtype="FLOAT"), "x").samples
    assert np.abs(loud - voice() / np.abs(voice()).max()).max() < 1e-6


def test_a_tone_survives_resampling_from_44100_hz() -> None:
    time = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    samples = decode(written(tone, 44_100), "x").samples
    exact = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert len(samples) == 16_000
    assert np.abs(samples - exact)[800:-800].max() < 1e-4
    above = 0.5 * np.sin(2 * np.pi * 12_000 * time)  # must not fold back below 8 kHz
    assert np.abs(decode(written(above, 44_100), "x").samples)[800:-800].max() < 1e-4


def test_a_header_that_lies_costs_no_memory() -> None:
    for data in (wav_with(40, "<I", 0x7FFFFF00), flac_declaring(50_000_000), flac_declaring(0)):
        tracemalloc.start()
        with suppress(BadAudio):  # the FLAC that promises 50 minutes is refused; what counts here is the peak
            decode(data, "x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_an_ogg_that_lost_its_end_is_used_and_marked() -> None:
    data = written(np.random.default_rng(4).uniform(-0.3, 0.3, 160_000), form="OGG")
    marks = decode(data[: len(data) * 6 // 10], "x").marks
    assert marks == ("ends without an end mark: possibly cut off",)
    assert decode(data, "x").marks == ()


def test_a_reason_travels_between_processes() -> None:
    error = BadAudio("the file is empty (0 bytes); copy or download it again")
    assert copy.deepcopy(error).reason == error.reason  # by the same protocol as between processes


def test_real_speech_gets_no_mark(shared_data: Path) -> None:
    for path in sorted((shared_data / "librispeech_mini" / "audio").iterdir())[:12]:
        assert decode(path.read_bytes(), path.name).marks == ()
