"""Each measure against signals whose value is known, and against real recordings."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import soxr

from components.audio import quality
from components.audio.decode import decode
from components.audio.quality import K_OFFSET, K_STAGES, measure
from components.schema import SAMPLE_RATE

CLEAN = ("8226-274369-0000", "7511-102419-0000")


def sine(decibels: float, seconds: float = 2.0, hertz: float = 997.0) -> np.ndarray:
    turns = 2 * np.pi * hertz * np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (10 ** (decibels / 20) * np.sin(turns)).astype(np.float32)


def noise(count: int, colour: str = "white", seed: int = 0) -> np.ndarray:
    """Of power 1; pink noise is flat below 50 Hz."""
    white = np.random.default_rng(seed).standard_normal(count)
    if colour == "white":
        return white
    spectrum = np.fft.rfft(white)
    hertz = np.arange(len(spectrum)) * SAMPLE_RATE / count
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(hertz, 50.0)), count)
    return pink / np.sqrt(np.square(pink).mean())


def voice(seconds: float = 6.0) -> np.ndarray:
    """Syllables of coloured noise with pauses, peak near 0.6; what lies above 3 kHz is weak, as in speech."""
    time_ = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    swell = np.maximum(np.sin(2 * np.pi * 2.3 * time_), 0) ** 2 * (np.sin(2 * np.pi * 0.4 * time_) > -0.6)
    return (0.15 * swell * noise(len(time_), "pink")).astype(np.float32)


def mixed(samples: np.ndarray, snr: float, colour: str) -> np.ndarray:
    scale = np.sqrt(np.square(samples).mean()) * 10 ** (-snr / 20)
    return (samples + scale * noise(len(samples), colour, seed=1)).astype(np.float32)


def real(folder: Path, name: str) -> np.ndarray:
    return decode((folder / name).read_bytes(), name).samples


def by_filtering(samples: np.ndarray) -> float:
    """Loudness as the standard writes it: filters at 48 kHz, blocks of 400 ms, two gates."""
    values = (3 * np.fft.irfft(np.fft.rfft(samples.astype(np.float64)), 3 * len(samples))).tolist()
    for (b0, b1, b2), (_, a1, a2) in K_STAGES:
        x1 = x2 = y1 = y2 = 0.0
        out = []
        for x in values:
            y = b0 * x + b1 * x1 + b2 * x2 - a1 * y1 - a2 * y2
            x1, x2, y1, y2 = x, x1, y, y1
            out.append(y)
        values = out
    square = np.square(np.array(values))
    blocks = np.array([square[at : at + 19_200].mean() for at in range(0, len(square) - 19_200 + 1, 4_800)])
    blocks = blocks[K_OFFSET + 10 * np.log10(blocks) > -70]
    return float(K_OFFSET + 10 * np.log10(blocks[blocks > 0.1 * blocks.mean()].mean()))


def test_loudness_of_the_standards_tone_and_of_its_gates() -> None:
    assert measure(sine(0.0)).loudness == pytest.approx(-3.01, abs=0.02)  # BS.1770-4, one front channel
    assert measure(sine(-20.0, 0.2)).loudness == pytest.approx(-23.01, abs=0.05)  # no whole block of 400 ms
    quiet, loud, faint = (
        sine(-33.0, 3.0),
        sine(-20.0, 20.0),
        sine(-75.0, 3.0),
    )  # EBU Tech 3341, cases 3 and 4, shortened
    assert measure(np.concatenate([quiet, loud, quiet])).loudness == pytest.approx(-23.01, abs=0.1)
    assert measure(np.concatenate([faint, quiet, loud, quiet, faint])).loudness == pytest.approx(-23.01, abs=0.1)
    assert measure(faint).loudness == -np.inf


def test_loudness_is_that_of_the_filters() -> None:
    for samples in (voice(1.5), (0.1 * noise(SAMPLE_RATE)).astype(np.float32)):
        assert measure(samples).loudness == pytest.approx(by_filtering(samples), abs=0.05)


def test_peak() -> None:
    samples = voice(1.0)
    samples[5000] = -0.9
    assert measure(samples).peak == pytest.approx(20 * np.log10(0.9), abs=1e-4)


def vowels(seconds: float = 4.0) -> np.ndarray:
    """Harmonics of 130 Hz that swell and fade, peak near 1."""
    time_ = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    waves = [np.cos(2 * np.pi * 130 * k * time_ + k * k) / k for k in range(1, 20)]
    return (0.5 * np.sum(waves, axis=0) * np.sin(2 * np.pi * 1.7 * time_) ** 2).astype(np.float32)


@pytest.mark.parametrize(("rate", "tolerance"), [(SAMPLE_RATE, 0.2), (22_050, 0.35), (44_100, 0.35)])
def test_clipping_before_and_after_a_change_of_rate(rate: int, tolerance: float) -> None:
    loud = 1.3 * soxr.resample(vowels(), SAMPLE_RATE, rate)
    share = np.mean(np.abs(loud) > 0.5)
    samples = soxr.resample(np.clip(loud, -0.5, 0.5), rate, SAMPLE_RATE)
    assert 0.02 < share < 0.2 and measure(samples).clipped == pytest.approx(share, rel=tolerance)


def test_what_is_not_clipped() -> None:
    assert [measure(sine(-6.0, hertz=hertz)).clipped for hertz in (50.0, 100.0, 997.0, 4000.0)] == [0.0] * 4
    assert measure(voice()).clipped == measure(vowels()).clipped == 0.0
    assert measure(np.full(8000, 0.05, np.float32)).clipped == 0.0


@pytest.mark.parametrize("colour", ["white", "pink"])
def test_snr_of_speech_with_noise(shared_data: Path, colour: str) -> None:
    for name in CLEAN:
        speech = real(shared_data, f"librispeech_speakers/audio/{name}.flac")
        assert measure(speech).snr > 33
        for snr in (0.0, 10.0, 20.0):
            assert measure(mixed(speech, snr, colour)).snr == pytest.approx(snr, abs=3.0)


def test_snr_of_what_is_steady_or_silent() -> None:
    assert measure((0.1 * noise(SAMPLE_RATE)).astype(np.float32)).snr == -20.0
    assert np.isnan(measure(np.zeros(SAMPLE_RATE, np.float32)).snr)
    padded = np.concatenate([np.zeros(2 * SAMPLE_RATE, np.float32), mixed(voice(), 15.0, "white")])
    assert measure(padded).snr == pytest.approx(15.0, abs=2.0)  # digital silence around a clip is not its noise


def test_bandwidth_finds_what_was_upsampled(shared_data: Path) -> None:
    for name in CLEAN:
        speech = real(shared_data, f"librispeech_speakers/audio/{name}.flac")
        narrow = soxr.resample(soxr.resample(speech, SAMPLE_RATE, 8000), 8000, SAMPLE_RATE)
        assert measure(speech).bandwidth > 6000 and 3400 <= measure(narrow).bandwidth <= 4200
    prompt = real(shared_data, "asterisk_prompts/audio/en_confbridge-only-one.flac")
    for samples in (prompt, mixed(prompt, 30.0, "white")):  # noise of the second converter reaches 8 kHz
        assert 3400 <= measure(samples).bandwidth <= 4200


def test_bandwidth_of_steady_sounds() -> None:
    white = (0.1 * noise(2 * SAMPLE_RATE)).astype(np.float32)
    assert measure(white).bandwidth == 8000.0
    assert measure(soxr.resample(soxr.resample(white, 16_000, 8000), 8000, 16_000)).bandwidth == pytest.approx(
        4200, abs=300
    )
    assert measure(sine(-20.0)).bandwidth < 2000.0


def test_silence_is_the_share_of_pauses() -> None:
    sound = (0.1 * noise(3 * SAMPLE_RATE)).astype(np.float32)
    room = (1e-3 * noise(SAMPLE_RATE)).astype(np.float32)
    assert measure(np.concatenate([room, sound])).silence == pytest.approx(0.25, abs=0.01)
    assert measure(sound).silence == 0.0 and measure(np.zeros(SAMPLE_RATE, np.float32)).silence == 1.0


def test_short_and_silent_clips_have_measures() -> None:
    for count in (1, 100, 800, 3200):
        found = measure(voice(1.0)[:count])
        assert found.bandwidth >= 125.0 or np.isnan(found.bandwidth)
        silent = measure(np.zeros(count, np.float32))
        assert silent.loudness == silent.peak == -np.inf and silent.clipped == 0.0 and np.isnan(silent.bandwidth)


def test_measures_do_not_depend_on_the_blocks_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = voice(3.0)
    found = measure(samples)
    monkeypatch.setattr(quality, "BLOCK", 7)
    assert measure(np.repeat(samples, 2)[::2]) == found


def test_bad_samples_are_refused() -> None:
    for samples in (np.zeros((2, 600), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match="mono"):
            measure(samples)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            measure(np.r_[voice(0.1), np.float32(value)])


@pytest.mark.slow
def test_snr_and_bandwidth_over_many_speakers(shared_data: Path) -> None:
    paths = sorted((shared_data / "librispeech_speakers" / "audio").iterdir())
    clips = [samples for path in paths if measure(samples := real(path.parent, path.name)).snr > 35]
    assert len(clips) > 25
    for snr in (0.0, 10.0, 20.0):
        errors = np.array([measure(mixed(samples, snr, "white")).snr - snr for samples in clips])
        assert abs(errors.mean()) < 1.5 and errors.std() < 0.8
    assert np.mean([measure(samples).bandwidth > 6000 for samples in clips]) == 1.0
    narrow = [soxr.resample(soxr.resample(samples, 16_000, 8000), 8000, 16_000) for samples in clips]
    assert all(3400 <= measure(samples).bandwidth <= 4200 for samples in narrow)


@pytest.mark.slow
def test_speed() -> None:
    """Against transforms of as many samples, in pieces that fit a cache: their time moves with the machine's."""
    samples, best, plain = voice(10.0), np.inf, np.inf
    pieces = samples.reshape(-1, 10, 500)
    for _ in range(50):
        start = time.process_time()
        measure(samples)
        between = time.process_time()
        for piece in pieces:
            np.fft.rfft(piece)
        best, plain = min(best, between - start), min(plain, time.process_time() - between)
    assert best < 8 * plain  # 3.8 to 5.6 of them, where 10 s of audio took 4 to 6 ms
