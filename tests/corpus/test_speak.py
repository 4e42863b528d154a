"""The corpus: counts, held-out voices and sentences, the same bytes each time, nothing done twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from components.corpus import speak as corpus
from components.corpus.espeak import SAMPLE_RATE
from components.corpus.speak import ACCENTS, MARGIN, TEST_VOICES, TRAIN_VOICES, plan_takes, speak_corpus, trim

CLIPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader")
    return speak_corpus(tmp_path_factory.mktemp("corpus"), clips=CLIPS).parent


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", range(3))
def test_plan_of_the_whole_corpus(seed: int) -> None:
    takes = plan_takes(1200, seed)
    assert Counter(take.split for take in takes) == {"train": 1030, "dev": 60, "test": 110}
    assert len({take.id for take in takes}) == 1200
    assert len({(take.sentence.text, take.voice, take.speed, take.pitch) for take in takes}) == 1200
    texts = {split: {take.sentence.text for take in takes if take.split == split} for split in ("train", "dev", "test")}
    assert not texts["train"] & (texts["dev"] | texts["test"]) and not texts["dev"] & texts["test"]
    voices = {split: {take.voice for take in takes if take.split == split} for split in texts}
    assert voices["train"] == voices["dev"] == set(TRAIN_VOICES)
    assert voices["test"] == set(TEST_VOICES)
    words = Counter(word for take in takes[:900] for word in take.sentence.words)
    assert min(words.values()) >= 15
    assert set(words) >= {word for take in takes for word in take.sentence.words}


def test_voices() -> None:
    assert not {voice.name for voice in TRAIN_VOICES} & {voice.name for voice in TEST_VOICES}
    assert not {voice.variant for voice in TRAIN_VOICES} & {voice.variant for voice in TEST_VOICES}
    assert {voice.accent for voice in TRAIN_VOICES} == set(ACCENTS)
    for voices in (TRAIN_VOICES, TEST_VOICES):
        assert {voice.gender for voice in voices} == {"female", "male"}


def test_rows_and_audio(folder: Path) -> None:
    rows = rows_of(folder)
    assert Counter(row["split"] for row in rows) == {"train": 51, "dev": 3, "test": 6}
    for row in rows:
        samples, rate = soundfile.read(folder / row["audio"], dtype="int16")
        assert samples.ndim == 1 and rate == row["sample_rate"] == SAMPLE_RATE
        assert row["duration"] == round(len(samples) / rate, 3)
        assert 0.6 < row["duration"] < 2.5
        assert 5_000 < np.abs(samples.astype(int)).max() < 32_767
        assert row["speaker"].startswith("espeak-") and row["gender"] in ("female", "male")
        assert row["labels"]["intent"] and row["licence"] == "CC0-1.0" and row["language"] == "en"
    assert 1.0 < np.mean([row["duration"] for row in rows]) < 1.7


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    speak_corpus(tmp_path, clips=CLIPS)
    assert bytes_of(tmp_path) == bytes_of(folder)


def test_a_second_call_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it spoke again")

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(corpus, "speak", refuse)
    assert speak_corpus(folder, clips=CLIPS) == folder / "manifest.jsonl"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_seed_or_a_lost_clip_is_spoken_again(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    speak_corpus(tmp_path, clips=20, seed=1)
    whole = bytes_of(tmp_path)
    (tmp_path / "audio" / "test-00000.flac").unlink()
    speak_corpus(tmp_path, clips=20, seed=1)
    assert bytes_of(tmp_path) == whole
    speak_corpus(tmp_path, clips=21, seed=2)
    assert len(list((tmp_path / "audio").iterdir())) == 21
    assert bytes_of(tmp_path) != whole


def test_an_interrupted_run_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(corpus, "speak", lambda utterances: iter([np.full(9_000, 1_000, np.int16)] * 5))
    with pytest.raises(ValueError, match=r"shorter|ended|fewer|zip"):
        speak_corpus(tmp_path, clips=20)
    assert len(list((tmp_path / "audio").iterdir())) == 5
    assert not (tmp_path / "manifest.jsonl").exists()
    monkeypatch.undo()
    assert len(rows_of(speak_corpus(tmp_path, clips=20).parent)) == 20


def test_the_manifest_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"audio": "mine.wav"}\n')
    with pytest.raises(FileExistsError, match="choose another folder"):
        speak_corpus(tmp_path, clips=20)
    assert (tmp_path / "manifest.jsonl").read_text() == '{"audio": "mine.wav"}\n'


@pytest.mark.parametrize("clips", [0, 19, 10_001])
def test_the_number_of_clips_has_limits(tmp_path: Path, clips: int) -> None:
    with pytest.raises(ValueError, match="20 to 10000"):
        speak_corpus(tmp_path, clips=clips)


def test_trim_leaves_the_same_margin_on_both_sides() -> None:
    margin = round(MARGIN * SAMPLE_RATE)
    speech = np.full(1_000, 8_000, dtype=np.int16)
    for before, after in ((0, 0), (10, 9_000), (9_000, 10)):
        trimmed = trim(np.concatenate([np.full(before, 20), speech, np.full(after, -20)]).astype(np.int16))
        assert len(trimmed) == 1_000 + 2 * margin
        assert np.array_equal(trimmed[margin:-margin], speech)
    with pytest.raises(RuntimeError, match="silent"):
        trim(np.zeros(100, dtype=np.int16))


@pytest.mark.slow
def test_the_largest_plan_has_no_clip_twice() -> None:
    takes = plan_takes(corpus.MOST, 0)
    assert len({(take.sentence.text, take.voice, take.speed, take.pitch) for take in takes}) == corpus.MOST
