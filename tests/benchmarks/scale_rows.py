"""A million segments of recordings and what ingest would write of them, without their audio: what `scale` works on.

Texts, speakers, durations, digests and fingerprints are as real columns have them. Some rows have the samples of an
earlier one, some its sound, and some speakers are in two splits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.audio.fingerprint import HOP_SECONDS
from components.schema import SAMPLE_RATE, ShardInfo
from components.seal import sealed
from components.shards.group import Keyed
from components.shards.index import SampleRow
from components.shards.parts import Part, group_digest, part_url, shard_name
from components.shards.settings import Ingest
from infra.storage import join, local_path, write_bytes

SEGMENTS = 100  # of one long recording
SPEAKERS = 5000
COPIES = 0.01  # of the rows have the samples of an earlier one, and as many its sound
CLIP_BYTES = 150_000
WORDS = (
    *("the", "a", "of", "and", "to", "light", "kitchen", "weather", "tomorrow", "train", "song", "water", "plants"),
    *("open", "window", "minutes", "until", "next", "Straße", "play", "again", "remind", "me", "please", "in", "is"),
)


def write_manifest(folder: Path, rows: int) -> None:
    """`manifest.jsonl` of so many segments, and the files that they are cut from, which nobody decodes here."""
    drawn = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-rows // SEGMENTS)):
        (folder / f"talk-{number:05d}.flac").write_bytes(f"recording {number}".encode())
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            words = drawn.integers(0, len(WORDS), (count, 12))
            ends = drawn.integers(3, 13, count)
            seconds = drawn.uniform(2, 15, count).round(2)
            speakers = drawn.integers(0, SPEAKERS, count)
            for i in range(count):
                row, speaker = start + i, int(speakers[i])
                split = "train" if speaker % 20 else "test"
                fields = {
                    "id": f"talk-{row // SEGMENTS:05d}-{row % SEGMENTS:02d}",
                    "audio": f"talk-{row // SEGMENTS:05d}.flac",
                    "offset": row % SEGMENTS * 15.0,
                    "duration": float(seconds[i]),
                    "text": " ".join(WORDS[word] for word in words[i, : ends[i]]),
                    "language": "en",
                    "speaker": f"speaker-{speaker:04d}",
                    "split": "dev" if row % 1000 == 7 else split,  # of speakers who are elsewhere as well: leaks
                    "labels": {"take": row % 7},
                    "source": "made up",
                    "licence": "CC0-1.0",
                }
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def write_parts(root: str, groups: Sequence[Sequence[Keyed]], data_url: str, settings: Ingest) -> None:
    """Records of finished shards with made-up rows, and tars of the right size that hold nothing."""
    local_path(root).mkdir(parents=True, exist_ok=True)
    prints = Prints()
    for number, group in enumerate(groups):
        name = shard_name(number)
        rows = tuple(made_up(keyed, name, place, prints) for place, keyed in enumerate(group))
        seconds, size = round(sum(row.seconds for row in rows), 4), CLIP_BYTES * len(rows)
        with open(join(root, name), "wb") as tar:
            tar.truncate(size)
        part = Part(
            inputs=group_digest(group, data_url, settings),
            shard=ShardInfo(name=name, sha256="0" * 64, bytes=size, samples=len(rows), seconds=seconds),
            rows=rows,
            rejects=(),
            sources={"made up": len(rows)},
            licences={"CC0-1.0": len(rows)},
        )
        write_bytes(part_url(root, number), sealed(part))


class Prints:
    """Digests and fingerprints of made-up audio: mostly new, at times those of the row before last."""

    def __init__(self) -> None:
        self.drawn = np.random.default_rng(2)
        self.latest: list[tuple[str, np.ndarray, float]] = []

    def next(self, seconds: float) -> tuple[str, np.ndarray, float]:
        chance = self.drawn.random()
        digest = self.drawn.bytes(32).hex()
        if chance < 2 * COPIES and len(self.latest) == 2:
            before, hashes, seconds = self.latest[0]
            if chance >= COPIES:  # a near duplicate: another digest, and one bit turned in every other hash
                turned = np.uint32(1) << self.drawn.integers(0, 32, len(hashes), dtype=np.uint32)
                hashes = hashes ^ np.where(np.arange(len(hashes)) % 2, turned, 0).astype(np.uint32)
            return (before if chance < COPIES else digest), hashes, seconds
        hashes = self.drawn.integers(1, 1 << 32, int(seconds / HOP_SECONDS), dtype=np.uint32)
        self.latest = [*self.latest[-1:], (digest, hashes, seconds)]
        return self.latest[-1]


def made_up(keyed: Keyed, shard: str, place: int, prints: Prints) -> SampleRow:
    """The row that ingest would write of a recording, without its audio."""
    recording, noted = keyed.recording, keyed.recording.annotation
    digest, hashes, seconds = prints.next(recording.duration or 1.0)
    return SampleRow(
        key=keyed.key,
        id=noted.id,
        shard=shard,
        audio_offset=CLIP_BYTES * place + 512,
        audio_size=140_000 + place,
        json_offset=CLIP_BYTES * place + 141_824,
        json_size=700,
        seconds=seconds,
        samples=round(seconds * SAMPLE_RATE),
        text=noted.text,
        text_length=len(noted.text or ""),
        language=noted.language,
        speaker=noted.speaker,
        gender=noted.gender,
        split=noted.split,
        labels=json.dumps(noted.labels),
        translation="{}",
        caption=None,
        audio_digest=digest,
        original=recording.url.rpartition("/")[2],
        marks="[]",
        conversations="null",
        source_digest=recording.digest,
        start=recording.start,
        fingerprint=tuple(hashes.tolist()),
    )
