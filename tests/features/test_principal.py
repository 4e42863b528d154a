"""Principal components: what was planted is found, and their artefact is reproducible and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feature_helpers import SmallEncoder, make_audio

import components.features.principal as principal
from components.features.extract import encode_clips
from components.features.principal import Moments, fit_components, fit_projection, gather_moments
from components.features.projection import load_projection
from components.shards.reader import ShardReader

LENGTHS = [[1.0, 2.0, 0.4], [1.5]]


def moments_of(frames: torch.Tensor) -> Moments:
    whole = frames.double()
    return Moments(len(whole), whole.sum(0), whole.T @ whole)


def test_a_planted_subspace_is_found_with_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q.T
    spread = torch.tensor([5.0, 3.0, 2.0])
    frames = (torch.randn(5000, 3, generator=generator) * spread) @ basis + 7.0
    frames += 0.1 * torch.randn(5000, 20, generator=generator)
    projection, explained = fit_components(moments_of(frames), 3)
    assert torch.allclose(projection.basis @ projection.basis.T, torch.eye(3), atol=1e-5)
    assert ((projection.basis @ basis.T).abs().diag() > 0.99).all()
    assert explained == pytest.approx(38 / (38 + 20 * 0.01), abs=0.001)
    assert (projection.mean - frames.mean(0)).abs().max() < 1e-4
    assert (projection.basis.gather(1, projection.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_moments_are_those_of_the_encoded_clips(tmp_path: Path) -> None:
    _, index = make_audio(tmp_path, LENGTHS)
    encoder, reader = SmallEncoder(), ShardReader(str(tmp_path))
    found = gather_moments(encoder, index, str(tmp_path))
    frames = torch.cat([encode_clips(encoder, [torch.from_numpy(reader.waveform(row))])[0] for row in index])
    expected = moments_of(frames)
    assert found.frames == expected.frames == 245
    assert torch.allclose(found.products, expected.products, atol=1e-4)


def test_the_artefact_follows_its_inputs_and_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audio, index = make_audio(tmp_path / "audio", LENGTHS)
    encoder, lake = SmallEncoder(), str(tmp_path / "lake")

    def fit(rows: list[dict[str, object]] = index, dims: int = 3, **more: int) -> tuple[str, str]:
        return fit_projection(encoder, rows, str(tmp_path / "audio"), audio.digest, dims, lake, **more)

    url, name = fit()
    projection, manifest = load_projection(url)
    assert url.endswith(f"/lake/projections/{name}") and manifest.digest == name
    assert projection.basis.shape == (3, 8) and manifest.frames == 245 and 0.3 < manifest.explained < 1
    others = {fit(dims=4)[1], fit(seed=1)[1], fit(max_frames=60)[1], fit(index[:2])[1]}
    assert len(others | {name}) == 5
    with monkeypatch.context() as patch:
        patch.setattr(principal, "gather_moments", None)  # nothing is computed the second time
        assert fit(index[::-1]) == (url, name)
    (Path(url) / "projection.json").unlink()  # killed before the record was written
    with pytest.raises(ValueError, match="no finished principal components"):
        load_projection(url)
    assert fit() == (url, name) and torch.equal(load_projection(url)[0].basis, projection.basis)


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    audio, index = make_audio(tmp_path, LENGTHS[1:])
    encoder = SmallEncoder()
    with pytest.raises(ValueError, match="is there a train split"):
        fit_projection(encoder, [], str(tmp_path), audio.digest, 3, str(tmp_path / "lake"))
    for dims in (0, 8, 256):
        with pytest.raises(ValueError, match=f"{dims} principal components of frames with 8 numbers.*features=int8"):
            fit_projection(encoder, index, str(tmp_path), audio.digest, dims, str(tmp_path / "lake"))
