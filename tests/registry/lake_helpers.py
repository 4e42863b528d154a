"""Lakes made by hand for what reads manifests, indexes and records only: no tar, no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from components.digest import digest, digest_bytes
from components.registry.records import INPUTS, LINEAGE, REGISTERED, inputs
from components.schema import AudioManifest, FeatureManifest, Reject, ShardInfo
from components.seal import sealed
from components.shards.index import INDEX, MANIFEST, REJECTS, SCHEMA, table_bytes
from infra import storage

SOURCE = "/data/talk"


class Said(BaseModel):
    """What is read of the records of codebooks and principal components."""

    digest: str
    features: str
    audio: str = ""
    seal: str = ""


def copied(made: Path, kind: str, folder: Path) -> str:
    """A copy of a lake to work on: in `folder`, or for `memory` in memory."""
    if kind == "local":
        return str(shutil.copytree(made, folder / "lake"))
    storage.upload_folder(made, f"memory://{folder.name}/lake")
    return f"memory://{folder.name}/lake"


def index_table(rows: int, per_shard: int = 4, speakers: int = 3) -> pa.Table:
    """`rows` clips of one second: clip i is of speaker s<i mod speakers>, file f<i>.wav, every fourth in test."""
    numbers = range(rows)
    text = {
        "key": [f"{i:07d}" for i in numbers],
        "id": [f"clip-{i}" for i in numbers],
        "shard": [f"shard-{i // per_shard:06d}.tar" for i in numbers],
        "speaker": [f"s{i % speakers}" for i in numbers],
        "split": ["test" if i % 4 == 3 else "train" for i in numbers],
        "audio_digest": [f"{i:063x}d" for i in numbers],
        "original": [f"spk/f{i}.wav" for i in numbers],
    }
    columns = {name: pa.array(values, pa.string()) for name, values in text.items()}
    columns["seconds"] = pa.array([1.0] * rows, pa.float64())
    blank: dict[Any, Any] = {pa.string(): "", pa.int64(): 0, pa.float64(): 0.0}
    rest = {
        field.name: pa.nulls(rows, field.type) if field.type not in blank else pa.array([blank[field.type]] * rows)
        for field in SCHEMA
        if field.name not in columns
    }
    return pa.table({field.name: (columns | rest)[field.name] for field in SCHEMA}, schema=SCHEMA)


def add_audio(
    lake: str, dataset: str, version: str, table: pa.Table, rejects: tuple[Reject, ...] = ()
) -> AudioManifest:
    """A finished version with this index."""
    url = storage.join(lake, "audio", dataset, version)
    data = table_bytes(table)
    names = sorted(set(table["shard"].to_pylist()))
    counted = table["shard"].to_pylist() if table.num_rows < 10_000 else []
    manifest = AudioManifest(
        dataset=dataset,
        version=version,
        digest=digest([dataset, version]),
        shards=tuple(ShardInfo(name=n, sha256="d" * 64, bytes=1, samples=counted.count(n), seconds=1.0) for n in names),
        samples=table.num_rows,
        seconds=float(table.num_rows),
        rejected=len(rejects),
        splits={"train": table.num_rows},
        config={},
        sources=(SOURCE, "a book"),
        licences={"CC0-1.0": table.num_rows},
        index_sha256=digest_bytes(data),
    )
    storage.write_bytes(storage.join(url, INDEX), data)
    storage.write_text(storage.join(url, REJECTS), "".join(one.model_dump_json() + "\n" for one in rejects))
    storage.write_bytes(storage.join(url, MANIFEST), sealed(manifest, indent=2))
    return manifest


def add_cache(lake: str, audio: AudioManifest, name: str, codebook: str | None = None) -> FeatureManifest:
    """A finished cache with one shard of 1000 bytes; `name` is its fingerprint."""
    manifest = FeatureManifest(
        kind="units" if codebook else "features",
        fingerprint=name,
        key={"encoder": {"kind": "whisper", "pool": 4}, "codebook": codebook},
        dataset=audio.dataset,
        version=audio.version,
        audio_digest=audio.digest,
        digest=digest([name, audio.digest]),
        shards=(),
        samples=audio.samples,
        frames=50 * audio.samples,
        width=8,
    )
    url = storage.join(lake, "features", name, audio.dataset, audio.version)
    storage.write_bytes(storage.join(url, "shard-000000.tar"), b"x" * 1000)
    storage.write_bytes(storage.join(url, "parts/shard-000000.json"), b"{}")
    storage.write_bytes(storage.join(url, "features.parquet"), b"index")
    storage.write_bytes(storage.join(url, MANIFEST), sealed(manifest))
    return manifest


def add_codebook(lake: str, name: str, features: FeatureManifest) -> None:
    storage.write_bytes(
        storage.join(lake, "units", name, MANIFEST), sealed(Said(digest=name, features=features.digest))
    )


def add_projection(lake: str, name: str, audio: AudioManifest) -> None:
    url = storage.join(lake, "projections", name, "projection.json")
    storage.write_bytes(url, sealed(Said(digest=name, audio=audio.digest, features="f" * 16)))


def add_stages(lake: str, names: list[str], audio: AudioManifest, features: list[FeatureManifest]) -> list[str]:
    """Finished stages that each start from those before."""
    urls: list[str] = []
    for name in names:
        url = storage.join(lake, "runs/salmonn/stages", name)
        storage.write_json(storage.join(url, INPUTS), inputs([audio], features, urls))
        storage.write_json(storage.join(url, MANIFEST), {"steps": 3})
        urls.append(url)
    return urls


def add_run(
    lake: str, name: str, audio: AudioManifest, features: list[FeatureManifest], stages: list[str], version: str = "1"
) -> str:
    """A registered run."""
    url = storage.join(lake, "runs/salmonn", name)
    record = inputs([audio], features, stages) | {"weights": {"earloom/lm": "e" * 64}}
    storage.write_json(storage.join(url, LINEAGE), record)
    made = {"name": "talker", "version": version, "alias": "candidate", "tracking_uri": "sqlite:////nowhere.db"}
    storage.write_json(storage.join(url, REGISTERED), made | {"uri": "", "folder": storage.join(url, "model")})
    return url
