"""The optional steps of ingest, each from files to the index: components/shards/samples.py and checks.py."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from shard_helpers import plan, put, tone

from components.schema import AudioManifest, Recording, Reject
from components.shards.index import read_index
from components.shards.ingest import ingest_group
from components.shards.publish import publish
from components.shards.reader import ShardReader, verify_shard
from components.shards.settings import Ingest
from infra import storage

Made = tuple[str, AudioManifest, list[dict[str, Any]], list[Reject]]
Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Ingest recordings with some steps → root, manifest, rows, rejects."""

    def made(recordings: list[Recording], **steps: Any) -> Made:
        settings, data = Ingest(**steps), str(tmp_path / "data")
        root = str(tmp_path / "lake" / f"v{len(list(tmp_path.glob('lake/v*')))}")
        groups, doubled = plan(recordings, data, 16)
        for number, group in enumerate(groups):
            ingest_group(number, group, root, data, settings)
        manifest = publish(root, "steps", "v", groups, doubled, data, 16, settings)
        lines = storage.read_text(f"{root}/rejects.jsonl").splitlines()
        rejects = [Reject.model_validate_json(line) for line in lines]
        return root, manifest, read_index(root).to_pylist(), rejects

    return made


def wav(samples: np.ndarray, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, 16_000, format=form, subtype=subtype)
    return buffer.getvalue()


def bursts(count: int, seconds: float = 2.0, pause: float = 0.5) -> np.ndarray:
    """Noise with pauses, `(samples,)`."""
    chance = np.random.default_rng(3)
    loud = [np.append(0.2 * chance.standard_normal(int(seconds * 16_000)), np.zeros(int(pause * 16_000)))] * count
    return np.clip(np.concatenate(loud), -1, 1).astype(np.float32)


def test_long_recordings_are_cut_at_pauses_and_nothing_is_lost(make: Make, tmp_path: Path) -> None:
    whole = bursts(5)
    long = put(f"{tmp_path}/data", "talk.wav", wav(whole), speaker="s")
    short = put(f"{tmp_path}/data", "short.wav", tone(1.0, 300))
    root, manifest, rows, rejects = make([long, short], cut="pauses", longest=6.0)
    assert not rejects
    assert [row["key"] for row in rows] == ["talk--0001", "talk--0002", "talk--0003", "short"]
    assert [row["id"] for row in rows][:2] == ["talk@0.000", f"talk@{rows[1]['start']:.3f}"]
    reader = ShardReader(root)
    joined = np.concatenate([reader.waveform(row) for row in rows[:3]])
    assert np.abs(joined - whole).max() < 1e-4
    for row in rows[1:3]:
        assert 0.0 < row["start"] % 2.5 - 2.0 < 0.5  # in one of the pauses
    assert {row["speaker"] for row in rows[:3]} == {"s"}
    assert manifest.samples == 4
    for shard in manifest.shards:
        verify_shard(root, shard)


def test_one_transcript_of_a_long_recording_is_not_torn_apart(make: Make, tmp_path: Path) -> None:
    long = put(f"{tmp_path}/data", "talk.wav", wav(bursts(5)), text="all of it")
    short = put(f"{tmp_path}/data", "short.wav", tone(1.0, 300), text="this")
    _, _, rows, (reject,) = make([long, short], cut="pauses", longest=6.0)
    assert [row["key"] for row in rows] == ["short"]
    assert (reject.id, reject.step) == ("talk", "decode")
    assert "12 s with one transcript cannot be cut at 6 s" in reject.reason


@pytest.mark.slow  # onnxruntime
def test_only_speech_is_kept_where_that_is_asked(make: Make, shared_data: Path, tmp_path: Path) -> None:
    file = min((shared_data / "librispeech_mini/audio").glob("*.flac"))
    speech, rate = sf.read(file, dtype="float32")
    assert rate == 16_000
    padded = np.concatenate([np.zeros(32_000, np.float32), speech, np.zeros(48_000, np.float32)])
    spoken = put(f"{tmp_path}/data", "spoken.flac", wav(padded, "FLAC"))
    noise = put(f"{tmp_path}/data", "noise.wav", wav(bursts(1)))
    _, _, rows, (reject,) = make([spoken, noise], cut="speech")
    assert (reject.id, reject.step) == ("noise", "speech")
    assert 1.5 < rows[0]["start"] < 3.0
    assert 0.6 * len(speech) < sum(row["samples"] for row in rows) <= len(speech) + 3200


def test_part_of_a_file_is_a_clip(make: Make, tmp_path: Path) -> None:
    whole = (0.3 * np.sin(np.linspace(0, 60, 48_000) ** 2)).astype(np.float32)
    file = put(f"{tmp_path}/data", "long.wav", wav(whole))
    parts = [
        file.model_copy(
            update={"start": start, "duration": 1.0, "annotation": file.annotation.model_copy(update={"id": name})}
        )
        for name, start in (("a", 0.0), ("b", 1.5))
    ]
    root, _, rows, rejects = make(parts)
    assert not rejects
    assert [(row["id"], row["start"], row["samples"]) for row in rows] == [("a", 0.0, 16_000), ("b", 1.5, 16_000)]
    assert np.abs(ShardReader(root).waveform(rows[1]) - whole[24_000:40_000]).max() < 1e-3


def test_measures_go_to_the_index_and_filters_count(make: Make, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    noise = (0.1 * chance.standard_normal(32_000)).astype(np.float32)
    clipped = np.clip(3 * np.sin(np.arange(32_000) * 0.05), -0.99, 0.99).astype(np.float32)
    files = {"noise": noise, "clipped": clipped, "short": noise[:4000]}
    recordings = [put(f"{tmp_path}/data", f"{name}.wav", wav(samples)) for name, samples in files.items()]
    _, manifest, rows, _ = make(recordings, measure=True)
    assert manifest.asides == {}
    by_name = {row["id"]: row for row in rows}
    assert by_name["noise"]["peak"] == pytest.approx(20 * np.log10(np.abs(noise).max()), abs=0.05)
    assert by_name["noise"]["bandwidth"] > 7000
    assert by_name["clipped"]["clipped"] > 0.5 > 0.01 > by_name["noise"]["clipped"]
    assert all(row["fingerprint"] is None for row in rows)
    _, manifest, rows, rejects = make(recordings, max_clipped=0.1, min_seconds=0.5)
    assert [row["id"] for row in rows] == ["noise"]
    assert manifest.asides == {"clipped": 1, "seconds": 1}
    assert "more than ingest.max_clipped=0.1" in rejects[0].reason
    assert rejects[1].reason == "0.25 s are less than ingest.min_seconds=0.5"


def test_texts_are_made_plain_and_checked(make: Make, tmp_path: Path) -> None:
    place = f"{tmp_path}/data"
    recordings = [
        put(place, "curly.wav", tone(1.0, 200), text="\u201cHello\u201d  there\u200b", language="en"),
        put(place, "script.wav", tone(1.0, 210), text="привет, как дела", language="en"),
        put(place, "fast.wav", tone(0.5, 220), text="far too many words for half a second " * 3, language="en"),
    ]
    _, manifest, rows, rejects = make(recordings, plain_text=True, check_language=True, check_rate=True)
    assert [(row["id"], row["text"]) for row in rows] == [("curly", '"Hello" there')]
    assert (manifest.asides, [reject.id for reject in rejects]) == ({"text": 2}, ["script", "fast"])


def test_the_same_samples_are_kept_once(make: Make, tmp_path: Path) -> None:
    place, sound = f"{tmp_path}/data", tone(1.0, 200)
    samples = sf.read(io.BytesIO(sound), dtype="int16")[0]
    recordings = [
        put(place, "first.wav", sound, split="test"),
        put(place, "again.flac", wav(samples, "FLAC"), split="train"),
        put(place, "other.wav", tone(1.0, 300), split="train"),
    ]
    root, manifest, rows, rejects = make(recordings, duplicates="exact")
    assert [row["id"] for row in rows] == ["first", "other"]
    assert (manifest.samples, manifest.splits, manifest.asides) == (2, {"test": 1, "train": 1}, {"duplicate": 1})
    assert (rejects[0].id, rejects[0].reason) == ("again", "the same samples as first, which is kept")
    checks = storage.read_json(f"{root}/checks.json")
    assert checks["duplicates"] == {"exact": 1, "near": 0, "examples": [["first", "again"]]}
    assert [(leak["kind"], leak["splits"], leak["count"]) for leak in checks["leaks"]] == [
        ("audio", ["train", "test"], 1)
    ]


def test_leaks_are_told_dropped_or_refused(make: Make, tmp_path: Path) -> None:
    place, sound = f"{tmp_path}/data", tone(1.0, 200)
    recordings = [
        put(place, "a.wav", sound, split="train", speaker="x"),
        put(place, "b.wav", sound, split="test", speaker="y"),
        put(place, "c.wav", tone(1.0, 300), split="train", speaker="y"),
        put(place, "d.wav", tone(1.0, 400), split="train", speaker="z"),
    ]
    root, manifest, _, _ = make(recordings)
    assert manifest.samples == 4
    assert [leak["kind"] for leak in storage.read_json(f"{root}/checks.json")["leaks"]] == ["audio"]
    _, manifest, rows, rejects = make(recordings, leaks="drop", leak_speakers=True)
    assert [row["id"] for row in rows] == ["b", "d"]
    assert manifest.asides == {"leak": 2}
    assert "the same audio is in test as well" in rejects[0].reason
    assert "speaker 'y' is heard in test as well" in rejects[1].reason
    with pytest.raises(ValueError, match=r"1 leaks between splits, .* audio of a \(train\) and b \(test\)"):
        make(recordings, leaks="refuse")


def test_a_flac_is_believed_where_that_is_asked_and_still_checked_when_read(make: Make, tmp_path: Path) -> None:
    sound = tone(1.0, 200, form="FLAC")
    damaged = bytearray(tone(1.0, 250, form="FLAC"))
    damaged[-200] ^= 0x40
    recordings = [put(f"{tmp_path}/data", "good.flac", sound), put(f"{tmp_path}/data", "bad.flac", bytes(damaged))]
    root, _, rows, rejects = make(recordings, trust=True)
    assert not rejects
    assert [row["audio_digest"][:4] for row in rows] == ["md5:", "md5:"]
    reader = ShardReader(root)
    assert len(reader.waveform(rows[0])) == 16_000
    with pytest.raises(ValueError, match="is damaged"):
        reader.waveform(rows[1])
    _, manifest, _, _ = make(recordings)
    assert manifest.asides == {"decode": 1}
    with pytest.raises(ValueError, match="trust=true decodes nothing"):
        Ingest(trust=True, measure=True)


def test_ogg_that_fits_is_kept_byte_for_byte(make: Make, tmp_path: Path) -> None:
    sound = wav(0.5 * bursts(1), "OGG", "VORBIS")
    root, _, (row,), rejects = make([put(f"{tmp_path}/data", "kept.ogg", sound)])
    assert not rejects
    stored = storage.read_range(f"{root}/{row['shard']}", row["audio_offset"], row["audio_size"])
    assert stored == sound
    assert len(ShardReader(root).waveform(row)) == row["samples"] == 40_000


def test_every_flipped_bit_is_seen_before_use(make: Make, tmp_path: Path) -> None:
    recordings = [put(f"{tmp_path}/data", f"{i}.wav", tone(0.2, 200 + i), text=f"number {i}") for i in range(3)]
    root, manifest, rows, _ = make(recordings)
    chance = np.random.default_rng(1)

    def use() -> None:
        read_index(root)
        verify_shard(root, manifest.shards[0])

    for name in ("samples.parquet", "manifest.json", manifest.shards[0].name):
        path = Path(root, name)
        whole = path.read_bytes()
        for bit in chance.integers(0, 8 * len(whole), 60).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|seal|another version"):
                use()
        path.write_bytes(whole)
    assert read_index(root).to_pylist() == rows
