"""A copy is known after what copies go through; another sentence, or another voice, is not taken for one."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from components.audio.decode import decode
from components.audio.fingerprint import HOP_SECONDS, LEAST_OVERLAP, alike, fingerprint, match, similarity, threshold
from components.schema import SAMPLE_RATE


def voice(seconds: float, seed: int) -> np.ndarray:
    """A harmonic sound whose pitch wanders and whose overtones come and go several times a second."""
    drawn = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    at = np.arange(count) / SAMPLE_RATE
    knots = np.arange(0, seconds + 0.3, 0.12)
    pitch = np.interp(at, knots, 120 + 60 * drawn.random(len(knots)))
    turn = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    loudness = [np.interp(at, knots, drawn.random(len(knots)) ** 3) for _ in range(14)]
    sound = sum(level * np.sin(turn * (n + 1) + n) for n, level in enumerate(loudness))
    return (0.1 * np.asarray(sound)).astype(np.float32)


def coded(samples: np.ndarray, form: str, subtype: str) -> np.ndarray:
    buffer = io.BytesIO()
    sf.write(buffer, samples, SAMPLE_RATE, format=form, subtype=subtype, compression_level=0.7)
    return decode(buffer.getvalue(), form).samples


def copies(samples: np.ndarray) -> dict[str, np.ndarray]:
    """What happens to recordings before they are met again."""
    noise = np.random.default_rng(0).normal(size=len(samples)) * np.sqrt(np.mean(samples**2))
    narrow = soxr.resample(soxr.resample(samples, SAMPLE_RATE, 8_000), 8_000, SAMPLE_RATE)
    made = {
        "quieter": samples * 0.2,
        "mp3": coded(samples, "MP3", "MPEG_LAYER_III"),
        "opus": coded(samples, "OGG", "OPUS"),
        "8 kHz": narrow,
        "cut by 0.25 s": samples[4000:],
        "cut by half a hash": samples[int(2.5 * HOP_SECONDS * SAMPLE_RATE) :],
        "noise at 20 dB": samples + 0.1 * noise,
        "cut and opus": coded(samples[3333:], "OGG", "OPUS"),
    }
    return {name: copy.astype(np.float32) for name, copy in made.items()}


def test_copies_of_a_synthetic_voice() -> None:
    clips = [voice(2.5, seed) for seed in range(4)]
    prints = [fingerprint(clip) for clip in clips]
    for name, copy in copies(clips[0]).items():
        assert alike(match(prints[0], fingerprint(copy))), name
    others = [similarity(a, b) for n, a in enumerate(prints) for b in prints[:n]]
    assert max(others) < 0.7


def test_hashes_and_the_best_alignment() -> None:
    clip = voice(6.0, 5)
    own = fingerprint(clip)
    assert own.dtype == np.uint32 and len(own) == pytest.approx((6.0 - 0.37) / HOP_SECONDS - 1, abs=1)
    assert np.array_equal(own, fingerprint(clip)) and similarity(own, own) == 1.0
    later, earlier = match(own, own[9:]), match(own[9:], own)
    assert later == (1.0, len(own) - 9, 9) and earlier == (1.0, len(own) - 9, -9)
    inverted = own ^ np.uint32(0xFFFFFFFF)
    assert similarity(own, inverted) < 0.68
    half = own.copy()
    half[::2] ^= np.uint32(0x0000FFFF)
    assert match(own, half).similarity == pytest.approx(0.75, abs=0.01)
    assert threshold(8) > 0.79 > threshold(20) > threshold(200) > 0.68


def test_silence_and_short_clips_match_nothing() -> None:
    assert len(fingerprint(np.zeros(SAMPLE_RATE, np.float32))) == 0
    assert len(fingerprint(np.full(SAMPLE_RATE, 1e-4, np.float32))) == 0
    for count in (0, 1, 5000, 7407, 7408, 8000, 9000):
        assert len(fingerprint(voice(1.0, 1)[:count])) <= 1
    short = fingerprint(voice(1.0, 1))
    assert 0 < len(short) < LEAST_OVERLAP and similarity(short, short) == 0.0
    paused = np.concatenate([voice(2.0, 2), np.zeros(3 * SAMPLE_RATE, np.float32), voice(2.0, 3)])
    hashes = fingerprint(paused)
    assert 25 <= np.count_nonzero(hashes == 0) <= 32
    assert match(hashes, hashes).overlap == np.count_nonzero(hashes)
    with pytest.raises(ValueError, match="mix the channels first"):
        fingerprint(np.zeros((2, 16_000), np.float32))


def real(folder: Path, name: str, step: int = 1) -> list[tuple[dict[str, str], np.ndarray]]:
    """Rows of a real data set and their samples."""
    rows = [json.loads(line) for line in (folder / name / "manifest.jsonl").read_text().splitlines()][::step]
    return [(row, decode((folder / name / row["audio"]).read_bytes(), row["audio"]).samples) for row in rows]


@pytest.mark.slow
def test_real_copies_and_other_sentences_lie_apart(shared_data: Path) -> None:
    """The worst copy agrees in far more bits than the best of 1,770 pairs of sentences, many by one speaker."""
    clips = [clip for _, clip in real(shared_data, "librispeech_mini")]
    prints = [fingerprint(clip) for clip in clips]
    others = [match(a, b) for n, a in enumerate(prints) for b in prints[:n]]
    assert not any(map(alike, others))
    found = dict.fromkeys(copies(clips[0]), 1.0)
    for own, clip in zip(prints[::3], clips[::3], strict=True):
        for name, copy in copies(clip).items():
            made = match(own, fingerprint(copy))
            assert alike(made), name
            found[name] = min(found[name], made.similarity)
    print({name: round(value, 3) for name, value in found.items()}, max(others)[0])
    assert max(others).similarity < 0.65 and min(found.values()) > 0.85


@pytest.mark.slow
def test_the_same_sentence_by_two_speakers_is_not_a_copy(shared_data: Path) -> None:
    """Ten sentences by eight actors in seven tempers, and prompts of one speaker that share most of their words."""
    rows = [(row, fingerprint(clip)) for row, clip in real(shared_data, "emodb")]
    best = 0.0
    for number, (row, own) in enumerate(rows):
        for other, its in rows[:number]:
            if row["text"] == other["text"]:
                made = match(own, its)
                assert not alike(made), (row["id"], other["id"])
                best = max(best, made.similarity)
    assert 0.6 < best < 0.72
    prompts = [fingerprint(clip) for _, clip in real(shared_data, "asterisk_prompts")]
    assert not any(alike(match(a, b)) for n, a in enumerate(prompts) for b in prompts[:n])


@pytest.mark.slow
def test_speed(shared_data: Path) -> None:
    clips = [clip for _, clip in real(shared_data, "librispeech_mini")]
    seconds = sum(map(len, clips)) / SAMPLE_RATE
    started = time.process_time()
    for clip in clips:
        fingerprint(clip)
    assert seconds / (time.process_time() - started) > 1_000  # 4,000 to 5,000 on an idle core
