"""Headers of FLAC and Ogg against libsndfile, in microseconds, and None for whatever is damaged."""

from __future__ import annotations

import hashlib
import io
import struct
import time

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from components.audio.decode import decode
from components.audio.encode import to_flac
from components.audio.headers import Header, fits, flac_md5, header

SAMPLES = (0.4 * np.sin(np.arange(24_000) * 0.07)).astype(np.float32)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000).astype(np.float32)


def written(form: str, subtype: str, rate: int = 16_000, channels: int = 1, samples: np.ndarray = SAMPLES) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, np.repeat(samples[:, None], channels, axis=1), rate, format=form, subtype=subtype)
    return buffer.getvalue()


CASES = [
    ("FLAC", "PCM_16", 16_000, 1),
    ("FLAC", "PCM_24", 16_000, 1),
    ("FLAC", "PCM_16", 44_100, 2),
    ("FLAC", "PCM_S8", 192_000, 8),
    ("OGG", "VORBIS", 16_000, 1),
    ("OGG", "VORBIS", 44_100, 2),
    ("OGG", "OPUS", 48_000, 1),
    ("OGG", "OPUS", 16_000, 2),
]


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), CASES)
def test_it_says_what_the_decoder_says(form: str, subtype: str, rate: int, channels: int) -> None:
    data = written(form, subtype, rate, channels)
    found = header(data)
    assert found is not None
    values, real_rate = sf.read(io.BytesIO(data), always_2d=True)
    frames = found.frames * real_rate // found.rate  # libsndfile keeps the rate that Opus was made from
    assert (frames, found.channels) == values.shape
    assert (found.format, found.subtype) == (form, "PCM_8" if subtype == "PCM_S8" else subtype)
    assert found.rate == (48_000 if subtype == "OPUS" else rate)
    kept = (form, subtype, rate, channels) in (CASES[0], CASES[4])
    assert (fits(data) is not None) == kept


def test_a_file_that_fits_decodes_to_what_it_declares() -> None:
    for samples in (SAMPLES, NOISE):
        for data in (to_flac(samples), written("OGG", "VORBIS", samples=samples)):
            found = fits(data)
            assert found is not None and found.frames == len(samples) == len(decode(data, "x").samples)
    assert fits(to_flac(SAMPLES)) == Header(16_000, 1, 24_000, "PCM_16", "FLAC")


def test_the_md5_of_a_flac_is_that_of_its_samples() -> None:
    data = to_flac(SAMPLES)
    whole, _ = sf.read(io.BytesIO(data), dtype="int16")
    assert flac_md5(data) == hashlib.md5(whole.tobytes()).hexdigest()
    assert flac_md5(data[:26] + bytes(16) + data[42:]) is None
    assert flac_md5(written("OGG", "VORBIS")) is None


def test_what_is_cut_unknown_or_too_long_does_not_fit() -> None:
    flac, ogg = to_flac(SAMPLES), written("OGG", "VORBIS", samples=NOISE)
    kept = int.from_bytes(flac[18:26], "big") >> 36 << 36
    for frames in (0, 100, (1 << 36) - 1):
        assert fits(flac[:18] + (kept | frames).to_bytes(8, "big") + flac[26:]) is None
    cut = [flac[:41], ogg[:-1], ogg[: len(ogg) // 2], ogg + b"x", ogg + ogg[:2000]]
    for data in (b"", b"fLaC", b"OggS", b"RIFF" * 20, ogg + ogg, *cut):
        assert fits(data) is None
    other = bytearray(ogg)
    struct.pack_into("<I", other, ogg.rindex(b"OggS") + 14, 77)  # the last page of another stream
    assert fits(bytes(other)) is None


@given(st.sampled_from([to_flac(SAMPLES), written("OGG", "VORBIS"), written("OGG", "OPUS")]), st.data())
@settings(max_examples=80, deadline=None)
def test_damage_never_raises(data: bytes, draw: st.DataObject) -> None:
    spoilt = bytearray(data[: draw.draw(st.integers(0, len(data)))])
    for place in draw.draw(st.lists(st.integers(0, 300), max_size=6)):
        if place < len(spoilt):
            spoilt[place] ^= draw.draw(st.integers(1, 255))
    header(bytes(spoilt)), fits(bytes(spoilt)), flac_md5(bytes(spoilt))


def test_it_takes_microseconds() -> None:
    for data in (to_flac(NOISE), written("OGG", "VORBIS", samples=NOISE)):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(200):
                fits(data)
            times.append((time.perf_counter() - began) / 200)
        assert min(times) < 1e-4
