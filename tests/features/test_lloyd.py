"""k-means in passes over shards: exact, the same for any number of workers, versioned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache

import components.features.lloyd as lloyd
from components.features.lloyd import Step, Sums, by_shard, chunks, fit_units_over, moved_centres, shard_sums
from components.features.store import FeatureStore
from components.features.units import assign, fit_units, load_codebook

LENGTHS = [[1.0, 2.0, 0.4], [1.5, 0.1], [0.7]]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    return make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")


def threads(count: int) -> lloyd.Over:
    def over(step: Step, pieces: Sequence[list[str]]) -> Iterable[Sums]:
        with ThreadPoolExecutor(count) as pool:
            yield from pool.map(step, pieces)

    return over


def distortion(frames: torch.Tensor, codebook: torch.Tensor) -> float:
    return float((frames - codebook[assign(frames, codebook).long()]).square().sum())


def test_a_pass_is_one_of_lloyds_steps(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lloyd, "CHUNK", 30)
    frames = torch.cat(list(map(store.load, store.places))).float()
    centres = frames[::40][:6].clone()
    pieces = by_shard(store, store.keys())
    assert list(map(len, pieces)) == [3, 2, 1]
    sums = [shard_sums(store, centres, piece) for piece in pieces]
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
    def one(distance: float) -> Sums:
        return Sums(torch.tensor([[2.0], [0.0], [0.0], [0.0]]).double(), torch.tensor([1, 0, 0, 0]), 0.0,
                    torch.tensor([distance]), distance)  # fmt: skip

    centres = torch.tensor([[0.0], [5.0], [6.0], [7.0]])
    assert moved_centres(centres, [one(3.0), one(9.0)]).tolist() == [[2.0], [9.0], [3.0], [7.0]]


def test_any_number_of_workers_gives_the_same_codebook_and_no_worse_than_the_sample(
    store: FeatureStore, tmp_path: Path
) -> None:
    found = []
    for count in (1, 2, 3):
        root = str(tmp_path / str(count))
        url, name = fit_units_over(store, store.keys(), 6, 0, root, threads(count), passes=4, max_frames=60)
        found.append((name, (Path(url) / "codebook.safetensors").read_bytes()))
    assert found == found[:1] * 3
    frames = torch.cat(list(map(store.load, store.places))).float()
    sample, _ = load_codebook(fit_units(store, store.keys(), 6, 0, str(tmp_path), max_frames=60)[0])
    codebook, manifest = load_codebook(url)
    assert (manifest.frames, manifest.passes, manifest.clusters) == (len(frames), 4, 6)
    assert distortion(frames, codebook) < 0.95 * distortion(frames, sample)


def test_passes_are_part_of_the_version(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, name = fit_units_over(store, store.keys(), 4, 0, str(tmp_path), passes=1)
    other = fit_units_over(store, store.keys(), 4, 0, str(tmp_path), passes=2)
    assert len({name, other[1], fit_units(store, store.keys(), 4, 0, str(tmp_path))[1]}) == 3
    monkeypatch.setattr(lloyd, "gather_frames", None)  # nothing is computed the second time
    assert fit_units_over(store, store.keys()[::-1], 4, 0, str(tmp_path), passes=1) == (url, name)
    manifest = Path(url) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"passes": 1', '"passes": 3'))
    with pytest.raises(ValueError, match="is damaged"):
        load_codebook(url)
    with pytest.raises(ValueError, match="train split"):
        fit_units_over(store, [], 4, 0, str(tmp_path))
    with pytest.raises(ValueError, match="passes=0"):
        fit_units_over(store, store.keys(), 4, 0, str(tmp_path), passes=0)
