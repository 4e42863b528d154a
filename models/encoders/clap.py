"""Microsoft CLAP 2023's audio encoder, HTSAT with its projection: one vector for each window of 7 s.

Source: arXiv 2309.05767 and the public weights; used by Pengi (one window, trained) and Audio Flamingo 1 (up to 16
windows, frozen). The Swin transformer is transformers' ClapAudioEncoder; the front end is in `clap_frontend`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import ClapAudioConfig
from transformers.models.clap.modeling_clap import ClapAudioEncoder as Layers

from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.clap_frontend import CLAP_RATE, DESCRIPTION, FFT, HOP, Windows, log_mel, peak_normalise, resample
from models.encoders.htsat import from_htsat, is_htsat
from models.encoders.loading import fill
from models.encoders.public import read_published
from models.pretrained import seeded

HTSAT = {"hidden_dropout_prob": 0.0, "drop_path_rate": 0.1}  # where the official HTSAT differs from transformers
AT_ONCE = 64  # windows in one pass, so that a batch of long clips does not take sixteen times the memory


class ClapConfig(BaseModel):
    """What is not in ClapAudioConfig; the defaults are Pengi's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int = Field(1, ge=1, description="at most; 1: short clips are repeated, more: zeros follow them")
    window_seconds: float = Field(7.0, gt=0)
    hop_seconds: float = Field(1.75, gt=0, description="from the start of one window to that of the next")
    projection: int = Field(1024, ge=0, description="width of the output; 0 = HTSAT's own, without projection")
    peak_normalise: bool = Field(False, description="scale each clip to its peak, 16 bits (Audio Flamingo)")


class Projection(nn.Module):
    """Linear, GELU, Linear, dropout, added to the first, LayerNorm; without biases in the linear layers."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(wide, width, bias=False), nn.Linear(width, width, bias=False)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.5)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, pooled: Tensor) -> Tensor:
        first = self.linear1(pooled)
        return self.layer_norm(first + self.dropout(self.linear2(functional.gelu(first))))  # type: ignore[no-any-return]


class ClapEncoder(AudioEncoder):
    """`spec.weights` is a public checkpoint (Pengi, CLAP 2023), or a folder with config.json and safetensors.

    `spec.config` holds entries of ClapConfig and ClapAudioConfig. With `spec.window` a clip always has all its windows,
    the absent ones silent, as Audio Flamingo's transformer sees them. Differences to the official training: batch norm
    keeps its statistics (they are no parameters, and a clip's vector must not depend on the others), no SpecAugment,
    and stochastic depth on the attention only. CLAP 2022 has another encoder (CNN14) and is not read.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        if spec.layer is not None:
            raise ValueError(f"clap has one vector a window and no layers to keep; leave layer empty, not {spec.layer}")
        entries, state, source = read_published(spec.weights) if spec.weights else ({}, None, Path())
        self.settings, config = split_config(entries | spec.config)
        self.spec = spec
        self.cutting = Windows(
            self.settings.windows,
            round(self.settings.window_seconds * CLAP_RATE),
            round(self.settings.hop_seconds * CLAP_RATE),
        )
        check_window(self.cutting.size, config)
        step = self.settings.hop_seconds if self.settings.windows > 1 else self.settings.window_seconds
        self.frame_rate = spec.pooled_rate(1 / step)
        with seeded(spec.seed):
            self.layers = Layers(config)
            wide = self.layers.num_features
            self.width = self.settings.projection or wide
            self.projection = Projection(wide, self.width) if self.settings.projection else nn.Identity()
        if state is not None:
            fill(self, self._own(state), source)
        self.eval()

    def _own(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        named = from_htsat(state) if is_htsat(state) else state
        left_out = () if self.settings.projection else ("projection.",)
        return {name: value for name, value in named.items() if not name.startswith(left_out)}

    def train(self, mode: bool = True) -> Self:
        """Training mode if a weight learns, else none: a frozen encoder gives what a feature cache holds.

        The batch norm never has it: its statistics stay those of the weights.
        """
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        self.layers.batch_norm.eval()
        return self

    def frames_of(self, samples: int) -> int:
        return self.cutting.most if self.spec.window else self.cutting.number(samples)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        device = self.device
        clips = [self.cut(row[: int(n)]) for row, n in zip(waveforms, lengths, strict=True)]
        windows = torch.cat(clips).split(AT_ONCE)
        vectors = torch.cat([self.embed(some.to(device)) for some in windows])
        return nn.utils.rnn.pad_sequence(vectors.split([len(clip) for clip in clips]), batch_first=True)

    def cut(self, clip: Tensor) -> Tensor:
        """One clip at 16 kHz, `(samples,)` → `(frames_of(samples), window)` at 44.1 kHz."""
        number = self.frames_of(len(clip))
        clip = functional.pad(clip[: self.cutting.longest()], (0, 1 if len(clip) == 0 else 0))
        clip = resample(clip)
        return self.cutting.cut(peak_normalise(clip) if self.settings.peak_normalise else clip, number)

    def embed(self, windows: Tensor) -> Tensor:
        """`(windows, samples)` at 44.1 kHz → `(windows, width)`."""
        spectra = log_mel(windows, self.layers.config.num_mel_bins)
        pooled = self.layers(spectra[:, None]).pooler_output
        return self.projection(pooled)  # type: ignore[no-any-return]

    def preprocessing(self) -> dict[str, Any]:
        padding = "zeros" if self.settings.windows > 1 else "repeated"
        cutting = asdict(self.cutting) | {"padding": padding, "peak_normalise": self.settings.peak_normalise}
        bins = {"bins": self.layers.config.num_mel_bins}
        return super().preprocessing() | DESCRIPTION | bins | {"windows": cutting}


def split_config(entries: dict[str, Any]) -> tuple[ClapConfig, ClapAudioConfig]:
    """Own settings and transformers' sizes. Raises ValueError for entries of neither, and for feature fusion."""
    own = {name: value for name, value in entries.items() if name in ClapConfig.model_fields}
    sizes = HTSAT | {name: value for name, value in entries.items() if name not in own}
    unknown = sorted(set(sizes) - set(ClapAudioConfig().to_dict()))
    if unknown:
        raise ValueError(f"unknown entries of clap's config: {', '.join(unknown)}")
    if sizes.get("enable_fusion"):
        raise ValueError("clap with enable_fusion is not supported; Microsoft's CLAP has none")
    return ClapConfig.model_validate(own), ClapAudioConfig(**sizes)


def check_window(size: int, config: ClapAudioConfig) -> None:
    """Raises ValueError if a window of `size` samples does not fit the square that the transformer folds it to."""
    most = config.spec_size * (config.spec_size // config.num_mel_bins)
    if not FFT <= size < most * HOP:
        between = f"{FFT / CLAP_RATE:.3f} and {most * HOP / CLAP_RATE:.3f}"
        raise ValueError(f"window_seconds must lie between {between} for a spectrogram of {most} frames")
