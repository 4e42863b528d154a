from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feature_helpers import SmallEncoder, make_audio, make_cache
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import components.features.units as units_module
from components.features.units import assign, deduplicate, fit_codebook, gather_frames


def planted(clusters: int = 12, width: int = 16, each: int = 100, far: float = 0.0) -> tuple[Tensor, Tensor]:
    """Centres at least 5 noise widths apart and points around them."""
    generator = torch.Generator().manual_seed(3)
    centres = 5 * torch.randn(clusters, width, generator=generator) + far
    noise = torch.randn(clusters * each, width, generator=generator)
    return centres, (centres.repeat_interleave(each, 0) + noise)[torch.randperm(clusters * each, generator=generator)]


@pytest.mark.parametrize("far", [0.0, 3000.0])
@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_are_recovered(seed: int, far: float) -> None:
    centres, points = planted(far=far)
    codebook = fit_codebook(points, 12, seed=seed)
    assert codebook.shape == (12, 16) and codebook.dtype == torch.float32
    distance = torch.cdist(centres.double(), codebook.double())
    assert sorted(distance.argmin(1).tolist()) == list(range(12))
    assert distance.min(1).values.max() < 0.7  # 4 noise widths / sqrt(100 points) in 16 dimensions = 0.4


def test_the_fit_is_deterministic_and_follows_the_seed() -> None:
    points = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_codebook(points, 20, seed=1), fit_codebook(points.clone(), 20, seed=1))
    assert not torch.equal(fit_codebook(points, 20, seed=1), fit_codebook(points, 20, seed=2))


def test_more_iterations_never_raise_the_distortion() -> None:
    points = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    sums = []
    for iterations in range(8):
        codebook = fit_codebook(points, 30, iterations=iterations)
        sums.append((points - codebook[assign(points, codebook).long()]).square().sum().item())
    assert sums == sorted(sums, reverse=True) and sums[-1] < 0.9 * sums[0]


def test_empty_clusters_are_seeded_anew() -> None:
    points = torch.cat([torch.zeros(500, 2), torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]])])
    start = torch.zeros(4, 2)
    nearest, distance = units_module.find_nearest(points, start)
    centres = units_module._means(points, nearest, distance, start)
    assert {tuple(centre) for centre in centres[1:].tolist()} == {(9.0, 0.0), (0.0, 9.0), (-9.0, 0.0)}
    assert sorted(set(assign(points, fit_codebook(points, 4)).tolist())) == [0, 1, 2, 3]


def test_equal_frames_and_too_few_frames() -> None:
    assert torch.equal(fit_codebook(torch.ones(10, 3), 4), torch.ones(4, 3))
    with pytest.raises(ValueError, match="5 clusters cannot be fitted to 4 frames"):
        fit_codebook(torch.ones(4, 3), 5)


@pytest.mark.parametrize("frames", [0, 1, 777, 2 * units_module.CHUNK + 1])
def test_assign_is_the_nearest_centre(frames: int) -> None:
    generator = torch.Generator().manual_seed(frames)
    points, codebook = (torch.randn(n, 6, generator=generator) for n in (frames, 11))
    found = assign(points, codebook)
    assert found.dtype == torch.int32 and found.shape == (frames,)
    assert torch.equal(found.long(), torch.cdist(points.double(), codebook.double()).argmin(1))


def test_ties_go_to_the_lower_unit() -> None:
    assert assign(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [-1.0], [1.0]])).tolist() == [0, 0]


@given(st.lists(st.integers(0, 3), max_size=50))
def test_runs_expand_to_what_they_were(values: list[int]) -> None:
    units = torch.tensor(values, dtype=torch.int32)
    kept, lengths = deduplicate(units)
    assert kept.dtype == torch.int32
    assert torch.equal(kept.repeat_interleave(lengths), units)
    assert bool((kept[1:] != kept[:-1]).all())
    assert bool((lengths > 0).all())


def test_gathered_frames_are_capped_and_reproducible(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path / "audio", [[1.0] * 8])
    store = make_cache(tmp_path / "lake", SmallEncoder(), audio, index, tmp_path / "audio")
    found = gather_frames(store, store.keys(), 120, seed=0)
    assert found.shape == (120, 8)
    assert torch.equal(found, gather_frames(store, store.keys(), 120, seed=0))
    assert not torch.equal(found, gather_frames(store, store.keys(), 120, seed=1))
