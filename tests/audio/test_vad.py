"""Speech is found where it is, in silence and noise none; batches and single clips give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.audio import vad
from components.audio.decode import decode
from components.audio.vad import MODEL, WINDOW, Span, batch_probabilities, speech_probabilities, speech_spans
from components.schema import SAMPLE_RATE
from models.weights.files import Source, locate


@pytest.fixture(scope="module")
def network() -> None:
    pytest.importorskip("onnxruntime")
    if locate(MODEL) is None:
        pytest.skip(f"no Silero VAD here: {vad.REMEDY}")


def clip(folder: Path, name: str) -> np.ndarray:
    return decode((folder / name).read_bytes(), name).samples


def official(probabilities: np.ndarray, samples: int) -> list[dict[str, Any]]:
    """The steps of get_speech_timestamps of silero-vad 5 with its default values, in samples."""
    least_speech, least_silence, pad = 250 * 16, 100 * 16, 30 * 16
    triggered, temp_end, current, speeches = False, 0, {}, []
    for i, probability in enumerate(probabilities):
        if probability >= 0.5 and temp_end:
            temp_end = 0
        if probability >= 0.5 and not triggered:
            triggered, current = True, {"start": WINDOW * i}
            continue
        if probability < 0.35 and triggered:
            temp_end = temp_end or WINDOW * i
            if WINDOW * i - temp_end < least_silence:
                continue
            current["end"] = temp_end
            if current["end"] - current["start"] > least_speech:
                speeches.append(current)
            triggered, temp_end, current = False, 0, {}
    if current and samples - current["start"] > least_speech:
        speeches.append({**current, "end": samples})
    for i, speech in enumerate(speeches):
        if i == 0:
            speech["start"] = max(0, speech["start"] - pad)
        if i == len(speeches) - 1:
            speech["end"] = min(samples, speech["end"] + pad)
            continue
        silence = speeches[i + 1]["start"] - speech["end"]
        by = silence // 2 if silence < 2 * pad else pad
        speech["end"] += by
        speeches[i + 1]["start"] = max(0, speeches[i + 1]["start"] - by)
    return speeches


runs = st.lists(st.tuples(st.sampled_from((0.01, 0.34, 0.4, 0.5, 0.9)), st.integers(1, 12)), max_size=30)


@settings(max_examples=100, deadline=None)
@given(runs, st.integers(0, WINDOW - 1))
def test_spans_are_those_of_the_official_rule(pieces: list[tuple[float, int]], missing: int) -> None:
    probabilities = np.array([value for value, count in pieces for _ in range(count)], np.float32)
    samples = max(0, len(probabilities) * WINDOW - missing)
    found = speech_spans(probabilities, samples / SAMPLE_RATE)
    expected = [
        (speech["start"] / SAMPLE_RATE, speech["end"] / SAMPLE_RATE) for speech in official(probabilities, samples)
    ]
    assert found == [pytest.approx(pair, abs=1.01 / SAMPLE_RATE) for pair in expected]


def test_onset_offset_and_lengths_can_be_set() -> None:
    probabilities = np.repeat([0.0, 0.6, 0.3, 0.6, 0.0, 0.0], 10).astype(np.float32)
    assert speech_spans(probabilities, pad=0.0) == [Span(0.32, 0.64), Span(0.96, 1.28)]
    assert speech_spans(probabilities, pad=0.0, offset=0.2) == [Span(0.32, 1.28)]
    assert speech_spans(probabilities, pad=0.0, min_silence=0.4) == [Span(0.32, 1.28)]
    assert speech_spans(probabilities, pad=0.0, min_speech=0.33) == []
    assert speech_spans(probabilities, onset=0.7) == []
    with pytest.raises(ValueError, match="pass its length"):
        speech_spans(probabilities, seconds=9.0)


@pytest.mark.usefixtures("network")
def test_noise_and_silence_are_no_speech() -> None:
    white = np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE)
    spectrum = np.fft.rfft(white)
    pink = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1.0))
    clips = [0.1 * white, 0.1 * pink / pink.std(), 1e-3 * white, np.zeros_like(white)]
    for probabilities in batch_probabilities([samples.astype(np.float32) for samples in clips]):
        assert speech_spans(probabilities) == [] and probabilities.max() < 0.5


@pytest.mark.usefixtures("network")
def test_words_are_covered_and_the_silence_before_them_is_not(shared_data: Path) -> None:
    speech = clip(shared_data, "librispeech_speakers/audio/8226-274369-0000.flac")
    room = 3e-4 * np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE).astype(np.float32)
    samples = np.concatenate([room, speech, room])
    spans = speech_spans(speech_probabilities(samples), len(samples) / SAMPLE_RATE)
    outside = samples.copy()
    for start, end in spans:
        outside[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = 0.0
    assert np.square(outside).sum() < 0.002 * np.square(samples).sum()
    power = np.cumsum(np.square(speech))
    first, last = (2.0 + np.searchsorted(power, share * power[-1]) / SAMPLE_RATE for share in (0.001, 0.999))
    assert spans[0].start == pytest.approx(first, abs=0.3) and spans[-1].end == pytest.approx(last, abs=0.3)
    assert spans[0].start > 1.9 and spans[-1].end < 2.1 + len(speech) / SAMPLE_RATE


@pytest.mark.usefixtures("network")
def test_a_batch_gives_what_each_clip_gives_alone() -> None:
    lengths = (5000, 0, 9000, 512, 1, 5000)
    random = np.random.default_rng(0)
    clips = [random.uniform(-0.3, 0.3, length).astype(np.float32) for length in lengths]
    together = batch_probabilities(clips)
    assert [len(found) for found in together] == [10, 0, 18, 1, 1, 10]
    for samples, found in zip(clips, together, strict=True):
        assert np.array_equal(found, speech_probabilities(samples))
    assert batch_probabilities([]) == []


@pytest.mark.usefixtures("network")
def test_a_wheel_that_is_missing_or_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vad._session.cache_clear()
    monkeypatch.setattr(vad, "MODEL", Source("pipecat", MODEL.path, "0" * 64))
    with pytest.raises(ValueError, match="pip install --no-deps pipecat-ai"):
        speech_probabilities(np.zeros(600, np.float32))
    monkeypatch.setattr(vad, "MODEL", Source("no_such_package", MODEL.path, MODEL.sha256))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps pipecat-ai"):
        speech_probabilities(np.zeros(600, np.float32))


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="mix the channels first"):
        speech_probabilities(np.zeros((2, 600), np.float32))
    with pytest.raises(ValueError, match="NaN or infinite"):
        speech_probabilities(np.full(600, np.nan, np.float32))


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_real_recordings(shared_data: Path) -> None:
    """Spans hold nearly all of the power of read speech, and leave out the waiting before and after spoken orders."""
    shares: dict[str, list[tuple[float, float]]] = {"librispeech_speakers": [], "picovoice_slu": []}
    for name, found in shares.items():
        clips = [clip(path.parent, path.name) for path in sorted((shared_data / name / "audio").iterdir())[::4]]
        for samples, probabilities in zip(clips, batch_probabilities(clips), strict=True):
            held = np.zeros(len(samples), bool)
            for start, end in speech_spans(probabilities, len(samples) / SAMPLE_RATE):
                held[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)] = True
            power = np.square(samples.astype(np.float64))
            found.append((float(power[held].sum() / power.sum()), float(held.mean())))
    read, orders = (np.array(found) for found in shares.values())
    assert np.median(read[:, 0]) > 0.995 and read[:, 1].mean() > 0.75
    assert np.median(orders[:, 0]) > 0.95 and 0.25 < orders[:, 1].mean() < 0.6
