"""k-means in passes over shards: exact, the same for any number of workers, versioned, as good as with all at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache, make_shards
from torch import Tensor

import components.features.lloyd as lloyd
from components.features.lloyd import Sweep, by_shard, chunks, fit_units, in_turn, moved_centres, shard_sums
from components.features.store import FeatureStore
from components.features.units import assign, fit_codebook, load_codebook

LENGTHS = [[1.0, 2.0, 0.4], [1.5, 0.1], [0.7]]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    return make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")


def threads(count: int) -> lloyd.Sweeper:
    """Sweeps by so many workers."""

    @contextmanager
    def sweeper(store: FeatureStore, pieces: list[list[str]]) -> Iterator[Sweep]:
        with ThreadPoolExecutor(count) as pool:
            yield lambda centres: pool.map(partial(shard_sums, store, centres), pieces)

    return sweeper


def all_frames(store: FeatureStore) -> Tensor:
    return torch.cat(list(map(store.load, store.places))).float()


def distortion(frames: Tensor, codebook: Tensor) -> float:
    return float((frames - codebook[assign(frames, codebook).long()]).square().sum())


def test_a_pass_is_one_of_lloyds_steps(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd, "CHUNK", 30)
    frames = all_frames(store)
    centres = frames[::40][:6].clone()
    pieces = by_shard(store, store.keys())
    assert list(map(len, pieces)) == [3, 2, 1]
    with in_turn(store, pieces) as sweep:
        sums = list(sweep(centres))
    nearest = assign(frames, centres).long()
    expected = torch.stack([frames[nearest == c].double().mean(0) for c in range(6)])
    assert torch.allclose(moved_centres(centres, sums).double(), expected, atol=1e-6)
    assert sum(s.distortion for s in sums) == pytest.approx(distortion(frames, centres), rel=1e-5)
    away = (frames - centres[nearest]).square().sum(1)
    best = max(sums, key=lambda s: s.distance)
    assert torch.equal(best.farthest, frames[away.argmax()])


def test_chunks_hold_every_frame_once() -> None:
    clips = [torch.full((n, 2), float(n)) for n in (1, lloyd.CHUNK, 5, 7)]
    found = list(chunks(clips))
    assert [len(part) for part in found] == [lloyd.CHUNK + 1, 12]
    assert torch.equal(torch.cat(found), torch.cat(clips))


def test_empty_clusters_take_the_farthest_frames_that_the_shards_name() -> None:
    def one(distance: float) -> lloyd.Sums:
        return lloyd.Sums(torch.tensor([[2.0], [0.0], [0.0], [0.0]]).double(), torch.tensor([1, 0, 0, 0]), 0.0,
                          torch.tensor([distance]), distance)  # fmt: skip

    centres = torch.tensor([[0.0], [5.0], [6.0], [7.0]])
    assert moved_centres(centres, [one(3.0), one(9.0)]).tolist() == [[2.0], [9.0], [3.0], [7.0]]


def test_any_number_of_workers_gives_the_same_codebook_and_a_better_one_than_the_sample(
    store: FeatureStore, tmp_path: Path
) -> None:
    found = []
    for count in (1, 2, 3):
        url, name = fit_units(
            store, store.keys(), 6, 0, str(tmp_path / str(count)), threads(count), passes=4, max_frames=60
        )
        found.append((name, (Path(url) / "codebook.safetensors").read_bytes()))
    assert found == found[:1] * 3
    frames = all_frames(store)
    sample, _ = load_codebook(fit_units(store, store.keys(), 6, 0, str(tmp_path), passes=0, max_frames=60)[0])
    codebook, manifest = load_codebook(url)
    assert (manifest.frames, manifest.passes, manifest.clusters) == (len(frames), 4, 6)
    assert distortion(frames, codebook) < 0.95 * distortion(frames, sample)


def test_a_codebook_is_fitted_once_and_read_back(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, lake = store.keys()[:4], str(tmp_path / "lake")
    url, name = fit_units(store, keys, 6, 0, lake)
    assert url.endswith(f"/lake/units/{name}")
    codebook, manifest = load_codebook(url)
    frames = sum(map(store.frames, keys))
    assert codebook.shape == (6, 8) and (manifest.frames, manifest.digest) == (frames, name)
    others = {fit_units(store, *other, root_url=lake)[1] for other in [(keys, 5, 0), (keys, 6, 1), (keys[:3], 6, 0)]}
    others |= {fit_units(store, keys, 6, 0, lake, passes=passes)[1] for passes in (0, 1)}
    assert len(others | {name}) == 6
    with pytest.raises(ValueError, match="train split"):
        fit_units(store, [], 4, 0, lake)
    monkeypatch.setattr(lloyd, "gather_frames", None)  # nothing is computed the second time
    assert fit_units(store, reversed(keys), 6, 0, lake, threads(2)) == (url, name)


def test_a_killed_fit_and_a_damaged_codebook(store: FeatureStore, tmp_path: Path) -> None:
    def fit() -> str:
        return fit_units(store, store.keys(), 3, 0, str(tmp_path))[0]

    folder = Path(fit())
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished codebook"):
        load_codebook(str(folder))
    assert fit() == str(folder) and (folder / "manifest.json").read_bytes() == manifest
    (folder / "manifest.json").write_bytes(manifest.replace(b'"passes": 10', b'"passes": 11'))
    with pytest.raises(ValueError, match="is damaged"):
        load_codebook(str(folder))
    (folder / "manifest.json").write_bytes(manifest)
    data = bytearray((folder / "codebook.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "codebook.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"codebook.safetensors is damaged.*fit it again"):
        load_codebook(str(folder))


@pytest.mark.slow
def test_real_speech_is_clustered_as_well_as_with_all_frames_at_once(shared_data: Path, tmp_path: Path) -> None:
    """Whisper frames of LibriSpeech: passes over shards from a sample, against 200 of Lloyd's steps on everything."""
    from models.encoders import build_encoder
    from models.encoders.base import EncoderSpec

    waves = [soundfile.read(path, dtype="int16")[0] for path in sorted(shared_data.glob("librispeech_mini/**/*.flac"))]
    audio, index = make_shards(tmp_path / "audio", [waves[i : i + 4] for i in range(0, len(waves), 4)])
    config = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    encoder = build_encoder(EncoderSpec(kind="whisper", config={**config, "max_source_positions": 1500}))
    store = make_cache(tmp_path / "lake", encoder, audio, index, tmp_path / "audio")
    frames = all_frames(store)
    reference = min(distortion(frames, fit_codebook(frames, 64, seed, iterations=200)) for seed in range(2))
    for sample, share in ((200_000, 1.01), (len(frames) // 4, 1.03)):
        url, _ = fit_units(store, store.keys(), 64, 0, str(tmp_path), max_frames=sample)
        assert distortion(frames, load_codebook(url)[0]) < share * reference
