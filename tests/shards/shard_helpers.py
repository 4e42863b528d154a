"""Small data sets of synthetic recordings for the tests of components/shards."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import soundfile as sf

from components.audio.identity import digest_of
from components.schema import Annotation, AudioManifest, Recording, Reject
from components.shards.group import Keyed, plan_groups, set_duplicates_aside
from components.shards.ingest import GroupReport, ingest_config, ingest_group
from components.shards.publish import dataset_version, publish
from infra import storage


def tone(seconds: float, pitch: float, rate: int = 16_000, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    """A quiet harmonic sound as the bytes of an audio file."""
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(2 * np.pi * 2.5 * pitch * time)
    buffer = io.BytesIO()
    sf.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def put(root: str, name: str, data: bytes, **annotation: object) -> Recording:
    """A file below `root` and its recording; the id is the name without its suffix."""
    url = storage.join(root, name)
    storage.write_bytes(url, data)
    noted = {"id": name.rpartition(".")[0], "split": "train", **annotation}
    return Recording(url=url, digest=digest_of(data), annotation=Annotation.model_validate(noted))


def make_data(root: str, count: int = 7) -> list[Recording]:
    """WAV and FLAC at three rates, with texts, and two files that cannot be used in the middle."""
    kinds = [("wav", 16_000, "WAV"), ("flac", 16_000, "FLAC"), ("wav", 8_000, "WAV"), ("flac", 22_050, "FLAC")]
    recordings = []
    for i in range(count):
        suffix, rate, form = kinds[i % 4]
        recordings.append(
            put(
                root,
                f"spk.{i % 2}/clip {i}.{suffix}",
                tone(0.2 + 0.05 * i, 150 + 40 * i, rate, form),
                text=f"näht {i}",
                speaker=f"s{i % 2}",
                language="de",
                licence="CC0-1.0",
                source="synthetic",
                labels={"digit": i},
                translation={"en": f"sews {i}"},
                split=("train", "dev")[i % 2],
            )
        )
    recordings.insert(2, put(root, "broken.wav", b"this is no audio"))
    missing = put(root, "missing.wav", tone(0.2, 100))
    storage.remove_tree(missing.url)
    return [*recordings[:5], missing, *recordings[5:]]


def run_ingest(
    root: str, recordings: Sequence[Recording], data: str, per_shard: int = 3, only: Sequence[int] | None = None
) -> list[GroupReport]:
    """Every group, or those of `only`, in this process."""
    groups = plan(recordings, data, per_shard)[0]
    numbers = range(len(groups)) if only is None else only
    return [ingest_group(number, groups[number], root, data) for number in numbers]


def plan(recordings: Sequence[Recording], data: str, per_shard: int = 3) -> tuple[list[list[Keyed]], list[Reject]]:
    kept, rejects = set_duplicates_aside(recordings, data)
    return plan_groups(kept, per_shard), rejects


def run_publish(root: str, recordings: Sequence[Recording], data: str, per_shard: int = 3) -> AudioManifest:
    groups, rejects = plan(recordings, data, per_shard)
    version = dataset_version(recordings, rejects, ingest_config(per_shard), data)
    return publish(root, "tones", version, groups, rejects, data, per_shard)


def all_bytes(root: str) -> dict[str, bytes]:
    """Every finished file of an artefact by its name."""
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.find(root)}
