"""Microsoft CLAP's front end: 44.1 kHz samples, cut into windows, as log-mel of a 32 kHz filter bank.

Source: microsoft/Pengi (`wrapper.py`, `models/htsat.py`) and NVIDIA/audio-flamingo (`foundation/data/data.py`). The
official code passes 44.1 kHz samples to filters that were computed for 32 kHz, so "50 Hz to 14 kHz" are really 69 Hz to
19.3 kHz; weights were trained so, and it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank

from models.encoders.base import SAMPLE_RATE
from models.encoders.precision import exact

CLAP_RATE = 44_100
FILTER_RATE = 32_000
FFT, HOP = 1024, 320
LOW, HIGH = 50.0, 14_000.0
POWER_FLOOR = 1e-10
FULL_SCALE = 32_767.0
DESCRIPTION = {
    "resampled": CLAP_RATE,
    "resampler": "soxr HQ",
    "mel": {"fft": FFT, "hop": HOP, "low": LOW, "high": HIGH, "filters_for": FILTER_RATE, "kind": "slaney, dB"},
}


@dataclass(frozen=True)
class Windows:
    """How a clip is cut: at most `most` windows of `size` samples at 44.1 kHz, `hop` apart.

    A clip shorter than its only window (`most` = 1) is repeated, as in Pengi; otherwise zeros follow it, as in Audio
    Flamingo. Pengi takes a window at random from a longer clip; here it is the first, so that a feature cache holds
    what a run would compute.
    """

    most: int
    size: int
    hop: int

    def number(self, samples: int) -> int:
        """Windows of a clip of `samples` at 16 kHz: the last one may reach beyond its end."""
        beyond = max(0, resampled_length(samples) - self.size)
        return min(self.most, 1 + -(-beyond // self.hop))

    def longest(self) -> int:
        """Samples at 16 kHz that the windows cover."""
        return -(-(self.size + (self.most - 1) * self.hop) * SAMPLE_RATE // CLAP_RATE)

    def cut(self, clip: Tensor, number: int) -> Tensor:
        """One clip at 44.1 kHz, `(samples,)` → `(number, size)`."""
        total = self.size + (number - 1) * self.hop
        if self.most == 1:
            clip = clip.repeat(-(-total // len(clip)))
        return functional.pad(clip, (0, max(0, total - len(clip))))[:total].unfold(0, self.size, self.hop)


def resampled_length(samples: int) -> int:
    """Samples at 44.1 kHz of a clip of `samples` at 16 kHz, rounded up; at least 1."""
    return -(-max(1, samples) * CLAP_RATE // SAMPLE_RATE)


def resample(clip: Tensor) -> Tensor:
    """One clip from 16 to 44.1 kHz, `(samples,)` → `(resampled_length(samples),)`, on the CPU (soxr HQ).

    Above 8 kHz there is nothing, where the official code has what the file holds.
    """
    size = resampled_length(len(clip))
    samples = soxr.resample(clip.detach().float().cpu().numpy(), SAMPLE_RATE, CLAP_RATE, quality="HQ")
    return torch.from_numpy(np.pad(samples[:size], (0, max(0, size - len(samples)))))  # soxr may give one less


def peak_normalise(clip: Tensor) -> Tensor:
    """Loudest sample at 1, then cut to 16-bit values, as Audio Flamingo loads audio; silence stays."""
    peak = clip.abs().max()
    clip = clip / peak if peak > 0 else clip
    return (clip * FULL_SCALE).trunc() / FULL_SCALE


@lru_cache(maxsize=16)
def mel_filters(bins: int, device: torch.device) -> Tensor:
    """Slaney mel filters from 50 Hz to 14 kHz for 32 kHz, `(513, bins)`."""
    edges = {"min_frequency": LOW, "max_frequency": HIGH, "sampling_rate": FILTER_RATE}
    filters = mel_filter_bank(FFT // 2 + 1, bins, **edges, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float().to(device)


@exact
def log_mel(windows: Tensor, bins: int = 64) -> Tensor:
    """Mel power in decibels, `(windows, samples)` → `(windows, samples // 320 + 1, bins)`; more than 512 samples.

    Hann window of 1024 samples, the signal mirrored at its ends; not below -100 dB.
    """
    hann = torch.hann_window(FFT, device=windows.device)
    spectrum = torch.stft(windows, FFT, HOP, window=hann, return_complex=True)
    power = spectrum.abs().square().transpose(1, 2) @ mel_filters(bins, windows.device)
    return 10.0 * power.clamp_min(POWER_FLOOR).log10()
