"""Spectra that encoders begin with, in torch: Whisper's log-mel and Kaldi's filter banks. Waveforms are 16 kHz."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from models.encoders.precision import exact

SAMPLE_RATE = 16_000
FFT, HOP = 400, 160
KALDI_FFT = NEMO_FFT = 512
KALDI_LOW = 20.0
PREEMPHASIS = 0.97
EPSILON = torch.finfo(torch.float32).eps
NEMO_ZERO, NEMO_EPSILON = 2.0**-24, 1e-5


@lru_cache(maxsize=16)
def slaney_filters(bins: int, device: torch.device, size: int = FFT) -> Tensor:
    """Slaney mel filters from 0 to 8 kHz over a transform of `size` points, `(bins, size // 2 + 1)`."""
    filters = mel_filter_bank(size // 2 + 1, bins, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.T.copy()).float().to(device)


@exact
def log_mel(waveforms: Tensor, bins: int = 80) -> Tensor:
    """Whisper's features, `(..., samples)` → `(..., bins, samples // 160)`; at least 201 samples.

    Hann window of 25 ms every 10 ms, the signal mirrored at its ends; log10 of the mel power, not more than 8 below
    the clip's loudest value, then (x + 4) / 4. Source: transformers' WhisperFeatureExtractor, equal to the bit.
    """
    window = torch.hann_window(FFT, device=waveforms.device)
    spectrum = torch.stft(waveforms, FFT, HOP, window=window, return_complex=True)[..., :-1]
    power = slaney_filters(bins, waveforms.device) @ spectrum.abs().square()
    logarithm = power.clamp_min(1e-10).log10()
    floor = logarithm.amax((-2, -1), keepdim=True) - 8.0
    return (torch.maximum(logarithm, floor) + 4.0) / 4.0


def normalise(waveform: Tensor) -> Tensor:
    """Zero mean and unit variance over a clip. Source: transformers' zero_mean_unit_var_norm."""
    return (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()


@lru_cache(maxsize=16)
def kaldi_filters(bins: int, device: torch.device) -> Tensor:
    """Kaldi's mel filters from 20 Hz to 8 kHz, triangles on the mel scale, `(bins, 257)`; the last column is 0."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * (1.0 + hertz / 700.0).log()

    with torch.device("cpu"):
        edges = mel(torch.tensor([KALDI_LOW, SAMPLE_RATE / 2], dtype=torch.float64))
        step = (edges[1] - edges[0]) / (bins + 1)
        left = edges[0] + torch.arange(bins, dtype=torch.float64)[:, None] * step
        at = mel(torch.arange(KALDI_FFT // 2, dtype=torch.float64) * SAMPLE_RATE / KALDI_FFT)[None]
        rising, falling = (at - left) / step, (left + 2 * step - at) / step
        filters = torch.minimum(rising, falling).clamp_min(0.0)
        return functional.pad(filters, (0, 1)).float().to(device)


def kaldi_frames(samples: int) -> int:
    """Frames of `kaldi_fbank`: only windows that fit; 0 below 400 samples."""
    return max(0, 1 + (samples - FFT) // HOP)


@exact
def kaldi_fbank(waveform: Tensor, bins: int = 128, window: Literal["povey", "hanning"] = "povey") -> Tensor:
    """Kaldi's log filter banks of one clip, `(samples,)` → `(frames, bins)`; at least 400 samples, no dither.

    Per window of 25 ms: mean removed, pre-emphasis 0.97, Povey's or Hanning's window, power spectrum of 512 points,
    natural log floored at float32's epsilon. Source: compute-fbank-feats with torchaudio's defaults (`snip_edges`,
    `use_power`).
    """
    frames = waveform.unfold(0, FFT, HOP)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = functional.pad(frames[:, None], (1, 0), mode="replicate")[:, 0, :-1]
    frames = frames - PREEMPHASIS * before
    turns = torch.arange(FFT, device=waveform.device, dtype=torch.float64) * (2 * math.pi / (FFT - 1))
    hanning = 0.5 - 0.5 * turns.cos()
    shape = (hanning if window == "hanning" else hanning.pow(0.85)).to(waveform.dtype)
    power = torch.fft.rfft(frames * shape, KALDI_FFT).abs().square()
    banks: Tensor = power @ kaldi_filters(bins, waveform.device).T
    return banks.clamp_min(EPSILON).log()


@exact
def nemo_mel(waveform: Tensor, bins: int = 80) -> Tensor:
    """NeMo's normalised log-mel of one clip, `(samples,)` → `(samples // 160, bins)`; at least 320 samples.

    Pre-emphasis 0.97 over the clip, symmetric Hann window of 25 ms every 10 ms in 512 points with zeros at the ends,
    natural log of Slaney mel power + 2^-24, then zero mean and unit variance of each bin over the clip. Source:
    transformers' ParakeetFeatureExtractor.
    """
    waveform = torch.cat([waveform[:1], waveform[1:] - PREEMPHASIS * waveform[:-1]])
    window = torch.hann_window(FFT, periodic=False, device=waveform.device)
    spectrum = torch.stft(
        waveform, NEMO_FFT, HOP, win_length=FFT, window=window, pad_mode="constant", return_complex=True
    )
    power = slaney_filters(bins, waveform.device, NEMO_FFT) @ spectrum[:, : len(waveform) // HOP].abs().square()
    logarithm = (power + NEMO_ZERO).log().T
    return (logarithm - logarithm.mean(dim=0)) / (logarithm.std(dim=0) + NEMO_EPSILON)
