"""Encoders in bfloat16: near float32 in every kind, the same wherever they run, and not while they learn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from models.encoders import AudioEncoder, build_encoder
from models.encoders.base import EncoderSpec
from models.encoders.clap_frontend import log_mel as clap_mel
from models.encoders.frontend import kaldi_fbank, log_mel, nemo_mel
from models.encoders.precision import products
from models.sizes import (
    CAVMAE_TINY,
    HTSAT_TINY_RANDOM,
    HUBERT_TINY_RANDOM,
    MERT_TINY_RANDOM,
    MOONSHINE_TINY_RANDOM,
    W2V_BERT_TINY_RANDOM,
    WAVLM_TINY_RANDOM,
    WHISPER_TINY_RANDOM,
)
from tests.models.encoder_helpers import clips
from tests.models.test_encoders import BEATS

CONFIGS = {
    "moonshine": MOONSHINE_TINY_RANDOM,
    "whisper": WHISPER_TINY_RANDOM,
    "beats": BEATS,
    "hubert": HUBERT_TINY_RANDOM,
    "wavlm": WAVLM_TINY_RANDOM,
    "mert": MERT_TINY_RANDOM,
    "w2vbert": W2V_BERT_TINY_RANDOM,
    "cavmae": CAVMAE_TINY,
    "clap": HTSAT_TINY_RANDOM,
}
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def heard(encoder: AudioEncoder, around: AbstractContextManager[object] | None = None) -> Tensor:
    with torch.inference_mode(), around or nullcontext():
        return torch.cat(encoder(clips(16_000, 9_000)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_frames_are_near_those_of_float32(kind: str) -> None:
    exact, fast = (
        heard(build_encoder(EncoderSpec(kind=kind, config=CONFIGS[kind], compute=compute)))
        for compute in ("float32", "bfloat16")
    )
    assert fast.dtype == torch.float32 and fast.shape == exact.shape
    assert 1e-5 < float((fast - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_live_frames_in_a_training_step_are_those_of_a_cache(compute: str) -> None:
    encoder = build_encoder(EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, compute=compute))
    encoder.requires_grad_(False)
    cached = heard(encoder)
    with AUTOCAST:
        live = torch.cat(encoder(clips(16_000, 9_000)))
    assert torch.equal(live, cached)


def test_an_encoder_that_learns_takes_the_precision_of_the_step() -> None:
    encoder = build_encoder(EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM, compute="bfloat16"))
    exact = heard(build_encoder(EncoderSpec(kind="whisper", config=WHISPER_TINY_RANDOM)))
    assert torch.equal(torch.cat(encoder(clips(16_000, 9_000))), exact)
    with AUTOCAST:
        fast = torch.cat([frames.float() for frames in encoder(clips(16_000, 9_000))])
    fast.sum().backward()
    assert torch.equal(fast, heard(encoder))


@pytest.mark.parametrize(
    ("channels", "groups", "kernel"),
    [(32, 4, 8), (32, 8, 128), (64, 16, 128), (768, 16, 128), (32, 32, 31), (64, 1, 7)],
)
@pytest.mark.parametrize("frames", [1, 5, 49, 200])
def test_convolutions_over_time_are_right(channels: int, groups: int, kernel: int, frames: int) -> None:
    layer = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups)
    check_convolution(layer, torch.randn(2, channels, frames))


@pytest.mark.parametrize("columns", [1, 2, 16])
@pytest.mark.parametrize(("size", "rows"), [(4, 64), (16, 8)])
def test_convolutions_over_a_spectrum_are_right(size: int, rows: int, columns: int) -> None:
    check_convolution(nn.Conv2d(1, 128, size, stride=size), torch.randn(3, 1, rows * size, columns * size))


def check_convolution(layer: nn.Module, given: Tensor) -> None:
    with torch.inference_mode():
        exact = layer(given)
        with products(torch.device("cpu"), True):
            fast = layer(given).float()
    assert float((fast - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("spectrum", [log_mel, clap_mel, kaldi_fbank, nemo_mel])
def test_spectra_are_float32_in_every_precision(spectrum: Callable[[Tensor], Tensor]) -> None:
    clip = clips(16_000)[0]
    given = clip[None] if spectrum is clap_mel else clip
    with AUTOCAST:
        found = spectrum(given)
    assert found.dtype == torch.float32 and torch.equal(found, spectrum(given))
