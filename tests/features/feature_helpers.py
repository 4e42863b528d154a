"""A small encoder and small audio shards for the tests of components/features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.audio.encode import to_flac, to_int16
from components.digest import digest
from components.features.extract import extract_shard
from components.features.form import Form
from components.features.key import feature_key, feature_root
from components.features.principal import fit_projection
from components.features.projection import load_projection
from components.features.store import FeatureStore, publish_features
from components.schema import AudioManifest, ShardInfo
from components.shards.digests import of_samples
from components.shards.tar import write_tar
from models.encoders.base import AudioEncoder, EncoderSpec

HOP = 320


class SmallEncoder(AudioEncoder):
    """One linear layer over blocks of 20 ms; counts its calls and the samples it was given, padding included."""

    def __init__(self, seed: int = 0, pool: int = 1, width: int = 8, weights: str | None = None) -> None:
        super().__init__()
        self.spec = EncoderSpec(kind="small", pool=pool, seed=seed, weights=weights, config={"width": width})
        self.width = width
        self.frame_rate = 50.0 / max(1, pool)
        self.project = nn.Linear(HOP, width)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.project.weight.normal_(generator=generator)
            self.project.bias.zero_()
        self.calls = 0
        self.padded_samples = 0

    def frames_of(self, samples: int) -> int:
        return max(1, -(-samples // HOP))

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        self.calls += 1
        self.padded_samples += waveforms.numel()
        padded = nn.functional.pad(waveforms, (0, -waveforms.shape[1] % HOP))
        return torch.tanh(self.project(padded.unflatten(1, (-1, HOP))))


def make_audio(root: Path, lengths: list[list[float]], seed: int = 0) -> tuple[AudioManifest, list[dict[str, Any]]]:
    """Audio shards of noise with clips of `lengths` seconds per shard, by hand → manifest and index rows."""
    random = np.random.default_rng(seed)
    return make_shards(
        root, [[(0.2 * random.standard_normal(int(s * 16_000))).astype(np.float32) for s in part] for part in lengths]
    )


def make_shards(root: Path, parts: list[list[np.ndarray]]) -> tuple[AudioManifest, list[dict[str, Any]]]:
    """Audio shards of these clips, each `(samples,)` float32 or int16 → manifest and index rows."""
    root.mkdir(parents=True, exist_ok=True)
    shards, index = [], []
    for number, waves in enumerate(parts):
        name = f"shard-{number:06d}.tar"
        keys = [f"{number:06d}-{i:03d}" for i in range(len(waves))]
        members = [
            member
            for key, wave in zip(keys, waves, strict=True)
            for member in ((f"{key}.flac", to_flac(wave)), (f"{key}.json", b"{}"))
        ]
        tar = write_tar(root / name, members)
        for i, (key, wave) in enumerate(zip(keys, waves, strict=True)):
            (audio_offset, audio_size), (json_offset, json_size) = tar.members[2 * i : 2 * i + 2]
            index.append(
                {
                    "key": key,
                    "id": key,
                    "shard": name,
                    "samples": len(wave),
                    "seconds": len(wave) / 16_000,
                    "audio_digest": of_samples(wave if wave.dtype == np.int16 else to_int16(wave)),
                    "audio_offset": audio_offset,
                    "audio_size": audio_size,
                    "json_offset": json_offset,
                    "json_size": json_size,
                }
            )
        seconds = sum(map(len, waves)) / 16_000
        shards.append(ShardInfo(name=name, sha256=tar.sha256, bytes=tar.bytes, samples=len(waves), seconds=seconds))
    manifest = AudioManifest(
        dataset="noise",
        version="0",
        digest=digest([shard.sha256 for shard in shards]),
        shards=tuple(shards),
        samples=len(index),
        seconds=sum(shard.seconds for shard in shards),
        rejected=0,
        splits={},
        config={},
        sources=(),
        licences={},
    )
    return manifest, index


def rows_of(index: list[dict[str, Any]], shard: ShardInfo) -> list[dict[str, Any]]:
    return [row for row in index if row["shard"] == shard.name]


def make_cache(
    lake: Path | str,
    encoder: AudioEncoder,
    audio: AudioManifest,
    index: list[dict[str, Any]],
    audio_root: Path | str,
    form: str = "bf16",
) -> FeatureStore:
    """The whole cache stage in a loop."""
    kept, projection, name, url = Form.parse(form), None, None, None
    if kept.dims:
        url, name = fit_projection(encoder, index, str(audio_root), audio.digest, kept.dims, str(lake))
        projection = load_projection(url)[0]
    key = feature_key(encoder, form=kept, projection_digest=name)
    root = feature_root(str(lake), key, audio.dataset, audio.version)
    for shard in audio.shards:
        rows = rows_of(index, shard)
        extract_shard(shard, rows, str(audio_root), encoder, root, form=kept, projection=projection)
    publish_features(root, key, audio, url)
    return FeatureStore(root)
