"""The cache holds what Moonshine and Whisper give live (random weights, real sizes of the front ends)."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from feature_helpers import make_audio, make_cache
from torch.nn.functional import cosine_similarity

from components.audio.identity import digest_at
from components.features.cost import estimate
from components.features.extract import Target, encode_clips, extract_all
from components.features.key import feature_key
from components.features.store import FeatureStore, publish_features
from components.schema import Annotation, AudioManifest, Recording
from components.shards.group import plan_groups
from components.shards.index import read_index
from components.shards.ingest import ingest_group
from components.shards.publish import publish
from components.shards.reader import ShardReader
from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.moonshine import MoonshineEncoder
from models.encoders.whisper import WhisperEncoder

MOONSHINE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 2,
    "decoder_num_key_value_heads": 2,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": 200,
}
LENGTHS = [[0.05, 1.7, 0.4, 1.69, 3.3, 0.41, 2.2, 1.68]]


def moonshine(pool: int = 1) -> AudioEncoder:
    return MoonshineEncoder(EncoderSpec(kind="moonshine", config=MOONSHINE, pool=pool))


def whisper(pool: int = 1, window: bool = False) -> AudioEncoder:
    return WhisperEncoder(EncoderSpec(kind="whisper", config=WHISPER, pool=pool, window=window))


@pytest.mark.parametrize(
    "encoder",
    [moonshine(), moonshine(pool=4), whisper(), whisper(pool=2), whisper(window=True)],
    ids=["moonshine", "moonshine-4", "whisper", "whisper-2", "whisper-window"],
)
def test_cached_is_live(encoder: AudioEncoder, tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    store = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
    reader = ShardReader(str(tmp_path / "audio"))
    for row in index:
        cached = store.load(row["key"])
        live = encode_clips(encoder, [torch.from_numpy(reader.waveform(row))])[0]
        assert cached.shape == live.shape == (encoder.output_length(row["samples"]), encoder.width)
        assert store.frames(row["key"]) == len(cached)
        assert ((cached.float() - live).abs() <= live.abs() * 2**-8 + 1e-4).all()  # bf16 keeps 8 bits
        assert cosine_similarity(cached.float(), live, dim=1).min() > 0.9999


def test_two_encoders_from_one_pass_are_the_bytes_of_two_passes(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoders = [moonshine(), whisper()]
    targets = [Target(encoder, str(tmp_path / "joint" / encoder.spec.kind)) for encoder in encoders]
    extract_all(audio.shards[0], index, str(tmp_path / "audio"), targets)
    assert len({store.manifest.fingerprint for store in (published_store(target, audio) for target in targets)}) == 2
    for encoder, target in zip(encoders, targets, strict=True):
        alone = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
        for name in ("shard-000000.tar", "features.parquet", "manifest.json"):
            assert (Path(alone.root) / name).read_bytes() == (Path(target.root) / name).read_bytes()


def published_store(target: Target, audio: AudioManifest) -> FeatureStore:
    publish_features(target.root, feature_key(target.encoder), audio)
    return FeatureStore(target.root)


def test_from_recordings_through_ingest_to_features(tmp_path: Path) -> None:
    make_audio(tmp_path / "noise", LENGTHS)
    with tarfile.open(tmp_path / "noise/shard-000000.tar") as tar:
        tar.extractall(tmp_path / "source", filter="data")
    recordings = [
        Recording(url=str(path), digest=digest_at(str(path)), annotation=Annotation(id=path.stem))
        for path in sorted((tmp_path / "source").glob("*.flac"))
    ]
    source, root = str(tmp_path / "source"), str(tmp_path / "audio")
    groups = plan_groups(recordings, per_shard=5)
    for number, group in enumerate(groups):
        ingest_group(number, group, root, source)
    audio = publish(root, "noise", "1", groups, [], source, 5)
    index = read_index(root).to_pylist()
    store = make_cache(tmp_path / "lake", whisper(), audio, index, root)
    store.verify()
    assert [shard.name for shard in store.manifest.shards] == [shard.name for shard in audio.shards]
    assert store.keys() == [row["key"] for row in index]
    assert store.manifest.frames == estimate(read_index(root), whisper(), store.root).frames


@pytest.mark.slow
def test_the_number_of_threads_does_not_change_the_bytes(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            targets = [
                Target(encoder, str(tmp_path / f"{count}" / encoder.spec.kind)) for encoder in (moonshine(), whisper())
            ]
            found.append(
                [part.shard.sha256 for part in extract_all(audio.shards[0], index, str(tmp_path / "audio"), targets)]
            )
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
