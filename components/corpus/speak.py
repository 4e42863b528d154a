"""A spoken corpus without a download: `speak_corpus` makes a folder of clips and a manifest with eSpeak NG.

The test split has voices and sentences that training never heard, dev known voices and new sentences. The audio
is for tests, the demo and the first run of a new user; a person's voice it is not.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from components.corpus.espeak import SAMPLE_RATE, Utterance, speak
from components.corpus.grammar import Sentence, Split, draw_sentences, split_sentences
from components.digest import digest, digest_bytes
from infra import storage

CORPUS_VERSION = 1  # raise it when the same seed no longer gives the same bytes
MARGIN = 0.05  # seconds of near silence before and after the speech
SILENCE = 0.02  # of the clip's peak: below it nothing is heard
SPEEDS = (150, 160, 170, 180, 190)  # words a minute
PITCHES = (40, 45, 50, 55, 60)
SHARES: dict[Split, float] = {"test": 110 / 1200, "dev": 60 / 1200}
FEWEST, MOST = 20, 10_000  # clips; more than that and the same delivery would have to be spoken twice

# Accent: file in the data of eSpeak NG 1.52.
ACCENTS = {
    "en-us": "gmw/en-US",
    "en-us-nyc": "gmw/en-US-nyc",
    "en-gb": "gmw/en",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-gbclan": "gmw/en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-029": "gmw/en-029",
}


@dataclass(frozen=True)
class Voice:
    """A speaker: an accent and a variant of the vocal tract."""

    accent: str
    variant: str
    gender: str

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}"


def _voices(accent: str, variants: Sequence[str]) -> tuple[Voice, ...]:
    return tuple(Voice(accent, variant, "female" if variant[0] == "f" else "male") for variant in variants)


# Clear voices only: no whisper, croak or Klatt synthesis. The test variants are of nobody who is trained on.
TRAIN_VOICES = (
    *_voices("en-us", ("f1", "f5", "m1", "Michael")),
    *_voices("en-us-nyc", ("f2", "m3")),
    *_voices("en-gb", ("f1", "Denis")),
    *_voices("en-gb-x-rp", ("f5", "m4", "Michael")),
    *_voices("en-gb-scotland", ("f1",)),
    *_voices("en-gb-x-gbclan", ("f2", "m3")),
    *_voices("en-gb-x-gbcwmd", ("f5",)),
    *_voices("en-029", ("m1",)),
)
TEST_VOICES = (
    *_voices("en-us", ("f4",)),
    *_voices("en-us-nyc", ("rob",)),
    *_voices("en-gb", ("f4",)),
    *_voices("en-gb-x-rp", ("pablo",)),
)


@dataclass(frozen=True)
class Take:
    """A clip before it is spoken."""

    id: str
    split: Split
    sentence: Sentence
    voice: Voice
    speed: int
    pitch: int

    @property
    def utterance(self) -> Utterance:
        voice = f"{ACCENTS[self.voice.accent]}+{self.voice.variant}"
        return Utterance(self.sentence.text, voice, speed=self.speed, pitch=self.pitch)


def speak_corpus(folder: Path, clips: int = 1200, seed: int = 0) -> Path:
    """Writes `manifest.jsonl` and `audio/*.flac` (22.05 kHz, mono, 16 bits) and returns the manifest.

    The manifest comes last; where it is there already for the same clips and seed, nothing is done. The same
    arguments give the same bytes. Raises ValueError for a number of clips outside FEWEST to MOST, FileExistsError
    if the folder holds a manifest of something else, RuntimeError if eSpeak NG is missing.
    """
    if not FEWEST <= clips <= MOST:
        raise ValueError(f"{clips} clips: the corpus has {FEWEST} to {MOST}")
    config = {"version": CORPUS_VERSION, "clips": clips, "seed": seed}
    manifest, receipt = folder / "manifest.jsonl", folder / "corpus.json"
    if manifest.exists() and not receipt.exists():
        raise FileExistsError(f"{manifest} was not made by speak_corpus; choose another folder")
    if _finished(manifest, receipt, digest(config)):
        return manifest
    _clear(manifest, receipt)
    takes = plan_takes(clips, seed)
    rows = [
        _write_clip(folder, take, samples)
        for take, samples in zip(takes, speak([take.utterance for take in takes]), strict=True)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    storage.write_json(str(receipt), {"config": config, "key": digest(config), "manifest": digest_bytes(text)})
    storage.write_bytes(str(manifest), text)
    return manifest


def plan_takes(clips: int, seed: int) -> list[Take]:
    """What is said by whom, each (sentence, voice, speed, pitch) once; train, then dev, then test."""
    rng = random.Random(seed)
    sentences = split_sentences(seed)
    counts = {split: max(1, round(share * clips)) for split, share in SHARES.items()}
    counts["train"] = clips - sum(counts.values())
    voices = {"train": TRAIN_VOICES, "dev": TRAIN_VOICES, "test": TEST_VOICES}
    takes: list[Take] = []
    for split in ("train", "dev", "test"):
        drawn = draw_sentences(sentences[split], counts[split], rng)
        takes += _deliveries(split, drawn, voices[split], rng)
    return takes


def _deliveries(split: Split, drawn: list[Sentence], voices: Sequence[Voice], rng: random.Random) -> Iterator[Take]:
    """Gives the voices their turn, shuffled each round, with a speed and a pitch that are new for the sentence."""
    used: dict[tuple[str, str], set[tuple[int, int]]] = {}
    rounds = itertools.chain.from_iterable(rng.sample(voices, len(voices)) for _ in itertools.count())
    for number, (sentence, voice) in enumerate(zip(drawn, rounds, strict=False)):
        said = used.setdefault((sentence.text, voice.name), set())
        free = [way for way in itertools.product(SPEEDS, PITCHES) if way not in said]
        speed, pitch = rng.choice(free)
        said.add((speed, pitch))
        yield Take(f"{split}-{number:05d}", split, sentence, voice, speed, pitch)


def trim(samples: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The speech with exactly MARGIN seconds around it, filled with zeros where eSpeak NG left less."""
    loud = np.abs(samples.astype(np.int32))
    heard = np.flatnonzero(loud > SILENCE * loud.max())
    if heard.size == 0:
        raise RuntimeError("eSpeak NG gave an utterance that is silent")
    margin = round(MARGIN * SAMPLE_RATE)
    padded = np.pad(samples, margin)
    return padded[heard[0] : heard[-1] + 1 + 2 * margin]


def _write_clip(folder: Path, take: Take, samples: npt.NDArray[np.int16]) -> dict[str, Any]:
    """Writes the FLAC and returns its row of the manifest."""
    samples = trim(samples)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    name = f"audio/{take.id}.flac"
    (folder / name).write_bytes(buffer.getvalue())
    scaled = samples.astype(np.float64) / 32768
    return {
        "id": take.id,
        "audio": name,
        "duration": round(len(samples) / SAMPLE_RATE, 3),
        "sample_rate": SAMPLE_RATE,
        "rms": round(float(np.sqrt(np.mean(scaled**2))), 5),
        "text": take.sentence.text,
        "language": "en",
        "speaker": f"espeak-{take.voice.name}",
        "gender": take.voice.gender,
        "split": take.split,
        "task": "asr+intent",
        "labels": {**take.sentence.labels, "accent": take.voice.accent, "speed": take.speed, "pitch": take.pitch},
        "text_source": "grammar",
        "source": "eSpeak NG",
        "licence": "CC0-1.0",
        "dataset": "espeak_commands",
    }


def _finished(manifest: Path, receipt: Path, key: str) -> bool:
    """Whether the manifest is the one that the receipt names for these arguments, and its clips are there."""
    if not manifest.exists() or not receipt.exists():
        return False
    noted = json.loads(receipt.read_text())
    text = manifest.read_bytes()
    if noted.get("key") != key or noted.get("manifest") != digest_bytes(text):
        return False
    clips = (manifest.parent / json.loads(line)["audio"] for line in text.splitlines())
    return all(clip.is_file() and clip.stat().st_size > 0 for clip in clips)


def _clear(manifest: Path, receipt: Path) -> None:
    """Removes what an earlier corpus left, its manifest first, so that no manifest names a half-written folder."""
    manifest.unlink(missing_ok=True)
    audio = manifest.parent / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    if receipt.exists():  # without it the files may be somebody else's
        for clip in audio.glob("*.flac"):
            clip.unlink()
