"""A recording is cut in its pauses and nowhere else if it has any; no sample is lost or comes twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.audio import vad
from components.audio.decode import decode
from components.audio.segments import long_runs, pauses, segments_of, split_at_pauses
from components.audio.vad import Span
from components.schema import SAMPLE_RATE
from models.weights.files import locate

NOISE = np.random.default_rng(0).standard_normal(20 * SAMPLE_RATE).astype(np.float32)


def recording(stretches: list[tuple[float, float]]) -> tuple[np.ndarray, list[Span]]:
    """Bursts of noise and near-silence, as (seconds of sound, seconds of pause after it); and where the sound is."""
    total = sum(sound + pause for sound, pause in stretches)
    samples, spans, at = 1e-3 * NOISE[: round(total * SAMPLE_RATE)], [], 0.0
    for sound, pause in stretches:
        samples[round(at * SAMPLE_RATE) : round((at + sound) * SAMPLE_RATE)] *= 200
        spans.append(Span(at, at + sound))
        at += sound + pause
    return samples, spans


def inside_sound(cut: int, spans: list[Span]) -> bool:
    return any(start < cut / SAMPLE_RATE < end for start, end in spans)


stretch = st.tuples(st.floats(0.1, 1.5), st.floats(0.25, 0.6))
unsorted_spans = st.lists(
    st.tuples(st.floats(-1, 12), st.floats(0, 4)).map(lambda pair: Span(pair[0], pair[0] + pair[1])), max_size=12
)


def test_a_short_recording_stays_whole() -> None:
    assert split_at_pauses(NOISE[: 2 * SAMPLE_RATE], longest=2.0) == [(0, 2 * SAMPLE_RATE)]
    assert split_at_pauses(NOISE[:0]) == []


def test_the_last_pause_of_a_piece_is_taken_in_its_middle() -> None:
    samples, spans = recording([(1.0, 0.4), (1.2, 0.5), (3.0, 0.0)])  # pauses at 1.0-1.4 and 2.6-3.1 s
    for found in (split_at_pauses(samples, 3.5), split_at_pauses(samples, 3.5, spans=spans)):
        assert [pytest.approx(end / SAMPLE_RATE, abs=0.02) for _, end in found] == [2.85, 6.1]


def test_a_pause_before_the_last_third_is_better_than_none() -> None:
    samples, spans = recording([(1.0, 0.3), (5.0, 0.0)])
    for found in (split_at_pauses(samples, 4.0), split_at_pauses(samples, 4.0, spans=spans)):
        assert found[0][1] / SAMPLE_RATE == pytest.approx(1.15, abs=0.06)


def test_without_any_pause_the_quietest_place_is_taken() -> None:
    samples = 0.2 * NOISE[: 5 * SAMPLE_RATE]
    samples[int(2.4 * SAMPLE_RATE) : int(2.6 * SAMPLE_RATE)] *= 0.7
    assert split_at_pauses(samples, 4.0)[0][1] / SAMPLE_RATE == pytest.approx(2.5, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(NOISE)), st.floats(1.0, 9.0), st.floats(0.0, 0.5), st.one_of(st.none(), unsorted_spans))
def test_pieces_tile_the_recording(count: int, longest: float, share: float, spans: list[Span] | None) -> None:
    found = split_at_pauses(NOISE[:count], longest, share * longest, spans)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])][: len(found)]
    assert (found[-1][1] if found else 0) == count
    lengths = [(end - begin) / SAMPLE_RATE for begin, end in found]
    assert all(0 < length <= longest for length in lengths)
    if len(found) > 1:
        assert min(lengths) > share * longest - 1 / SAMPLE_RATE


@settings(max_examples=60, deadline=None)
@given(st.lists(stretch, min_size=3, max_size=9), st.booleans())
def test_no_cut_is_in_the_sound_where_a_pause_is_in_reach(stretches: list[tuple[float, float]], known: bool) -> None:
    samples, spans = recording(stretches)
    found = split_at_pauses(samples, 4.0, 1.0, spans if known else None)
    for begin, end in found[:-1]:
        assert not inside_sound(end, spans), (begin, end)  # a stretch is at most 1.5 s long, the reach at least 2 s


@settings(max_examples=60, deadline=None)
@given(unsorted_spans, st.floats(1.0, 6.0), st.floats(0, 1), st.floats(0, 0.5))
def test_segments_are_sorted_apart_short_enough_and_hold_all_speech(
    spans: list[Span], longest: float, join_gap: float, pad: float
) -> None:
    samples = NOISE[: 10 * SAMPLE_RATE]
    found = segments_of(samples, spans, longest, join_gap, pad)
    held = np.zeros(len(samples), np.int64)
    for begin, end in found:
        assert 0 <= begin < end <= len(samples) and end - begin <= longest * SAMPLE_RATE
        held[begin:end] += 1
    assert held.max(initial=0) <= 1 and found == sorted(found)
    for start, end in spans:
        assert held[max(0, round(start * SAMPLE_RATE)) : max(0, round(end * SAMPLE_RATE))].all()


def test_segments_are_joined_over_short_gaps_and_padded() -> None:
    spans = [Span(1.0, 2.0), Span(2.3, 3.0), Span(4.0, 4.5), Span(5.1, 9.0)]
    found = segments_of(NOISE[: 9 * SAMPLE_RATE], spans, longest=30.0, join_gap=0.4, pad=0.4)
    seconds = [(begin / SAMPLE_RATE, end / SAMPLE_RATE) for begin, end in found]
    assert seconds == pytest.approx(np.array([(0.6, 3.4), (3.6, 4.8), (4.8, 9.0)]))


def test_a_long_segment_is_cut_between_its_spans() -> None:
    spans = [Span(0.5, 2.5), Span(2.8, 5.0), Span(5.3, 8.0)]
    found = segments_of(NOISE[: 10 * SAMPLE_RATE], spans, longest=5.5, join_gap=0.5, pad=0.1)
    assert [round(end / SAMPLE_RATE, 1) for _, end in found] in ([5.2, 8.1], [5.1, 8.1])


def test_pauses_of_a_steady_sound_of_silence_and_of_both() -> None:
    assert not pauses(np.full(100, 0.01)).any() and pauses(np.zeros(100)).all()
    assert pauses(np.r_[np.full(50, 0.01), np.full(30, 1e-6)]).tolist() == [False] * 50 + [True] * 30
    assert not pauses(np.r_[np.full(50, 0.01), np.full(15, 1e-6), np.full(50, 0.01)]).any()


def test_long_runs() -> None:
    mask = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1], bool)
    assert long_runs(mask, 3).tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert long_runs(mask[:0], 1).tolist() == []


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(ValueError, match="mix the channels first"):
        split_at_pauses(np.zeros((2, 10), np.float32))
    for longest, shortest in ((0.5, 0.1), (4.0, 2.5), (float("nan"), 0.0), (4.0, -1.0)):
        with pytest.raises(ValueError, match="cannot be cut"):
            split_at_pauses(NOISE, longest, shortest)
    with pytest.raises(ValueError, match="must not be below 0"):
        segments_of(NOISE, [], pad=-0.1)


@pytest.mark.slow
def test_real_speech_is_cut_where_nobody_speaks(shared_data: Path) -> None:
    pytest.importorskip("onnxruntime")
    if locate(vad.MODEL) is None:
        pytest.skip(f"no Silero VAD here: {vad.REMEDY}")
    paths = sorted((shared_data / "librispeech_mini" / "audio").iterdir())
    samples = np.concatenate([decode(path.read_bytes(), path.name).samples for path in paths])
    probabilities = vad.speech_probabilities(samples)
    spans = vad.speech_spans(probabilities, len(samples) / SAMPLE_RATE)
    by_power, by_spans = split_at_pauses(samples, 15.0), split_at_pauses(samples, 15.0, spans=spans)
    assert len(by_power) > 30 and len(by_spans) > 30
    assert sum(inside_sound(end, spans) for _, end in by_power[:-1]) <= 0.15 * len(by_power)
    windows = [end // vad.WINDOW for _, end in by_power[:-1]]
    nearby = [probabilities[window - 3 : window + 4].min() for window in windows]  # the network lets go a bit later
    assert np.mean(np.array(nearby) < 0.5) > 0.97
    assert sum(inside_sound(end, spans) for _, end in by_spans[:-1]) <= 1
    found = segments_of(samples, spans, 15.0)
    assert max(end - begin for begin, end in found) <= 15 * SAMPLE_RATE
    kept = sum(end - begin for begin, end in found) / len(samples)
    assert sum(end - start for start, end in spans) / (len(samples) / SAMPLE_RATE) <= kept < 1.0
