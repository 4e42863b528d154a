"""Strided convolutions and a bottleneck adapter for each encoder, then both side by side: WavLLM's connector.

Source: arXiv 2404.00656; official code microsoft/SpeechT5, WavLLM/wavllm (models/whisper_encoder.py, wavlm.py,
modules/convolution.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.connectors.frames import group_count, zero_behind


class Conv1dSubsampler(nn.Module):
    """Two convolutions of kernel 3 and stride 2, each with a gated linear unit: a quarter of the rate, rounded up."""

    def __init__(self, width: int, middle: int, out: int) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(
            [
                nn.Conv1d(width, middle, 3, stride=2, padding=1),
                nn.Conv1d(middle // 2, 2 * out, 3, stride=2, padding=1),
            ]
        )

    def tokens(self, frames: int) -> int:
        return group_count(frames, 4, drop_remainder=False)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)`, `(clips,)` → `(clips, tokens, out)`, `(clips,)`."""
        for conv in self.conv_layers:
            # Zeros before each convolution, as alone: a bias makes the padding of the first something else.
            frames = functional.glu(conv(zero_behind(frames, lengths).transpose(1, 2)), dim=1).transpose(1, 2)
            lengths = group_count(lengths, 2, drop_remainder=False)
        return frames, lengths


class BottleneckAdapter(nn.Module):
    """Down, GELU, up, LayerNorm; the input is added behind the norm."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down_layer = nn.Linear(width, bottleneck)
        self.up_layer = nn.Linear(bottleneck, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        """`(..., width)` → the same."""
        return frames + self.layer_norm(self.up_layer(functional.gelu(self.down_layer(frames))))  # type: ignore[no-any-return]


class ConvBottleneck(nn.Module):
    """One branch: subsampler to `channels`, bottleneck adapter, Linear to `out`.

    With `layers`, frames hold that many encoder layers side by side, and a learned softmax-weighted sum of them comes
    first (WavLM's 13; the weights start at one). WavLLM: Whisper 1280, middle 1280; WavLM 768, middle 512.
    """

    def __init__(
        self,
        width: int,
        middle: int,
        out: int = 2048,
        channels: int = 1024,
        bottleneck: int = 512,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        self.output_weights = nn.Parameter(torch.ones(layers)) if layers else None
        self.subsample = Conv1dSubsampler(width, middle, channels)
        self.adapter = BottleneckAdapter(channels, bottleneck)
        self.projector = nn.Linear(channels, out)

    def tokens(self, frames: int) -> int:
        return self.subsample.tokens(frames)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)` or `(clips, frames, layers x width)` → `(clips, tokens, out)`, `(clips,)`."""
        if self.output_weights is not None:
            weights = self.output_weights.softmax(0)
            frames = torch.einsum("cflw,l->cfw", frames.unflatten(-1, (len(weights), -1)), weights)
        frames, counts = self.subsample(frames, lengths)
        return self.projector(self.adapter(frames)), counts


class JoinedBranches(nn.Module):
    """Two branches, trimmed to the shorter, side by side through one Linear (`wavlm_audio_proj`).

    With `audio_proj` the official model's projection of the first branch alone is there too: no path uses it, but
    the published number of trainable parameters counts it.
    """

    def __init__(
        self, audio_encoder: ConvBottleneck, wavlm_encoder: ConvBottleneck, out: int, audio_proj: bool = False
    ) -> None:
        super().__init__()
        self.audio_encoder = audio_encoder
        self.wavlm_encoder = wavlm_encoder
        widths = audio_encoder.projector.out_features, wavlm_encoder.projector.out_features
        self.wavlm_audio_proj = nn.Linear(sum(widths), out)
        self.audio_proj = nn.Linear(widths[0], out) if audio_proj else None

    def tokens(self, audio_frames: int, wavlm_frames: int) -> int:
        return min(self.audio_encoder.tokens(audio_frames), self.wavlm_encoder.tokens(wavlm_frames))

    def forward(
        self, audio: Tensor, wavlm: Tensor, audio_lengths: Tensor, wavlm_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Frames and lengths of both encoders → `(clips, tokens, out)`, `(clips,)`."""
        first, first_counts = self.audio_encoder(audio, audio_lengths)
        second, second_counts = self.wavlm_encoder(wavlm, wavlm_lengths)
        counts = torch.minimum(first_counts, second_counts)
        longest = int(counts.max())
        joined = torch.cat([first[:, :longest], second[:, :longest]], dim=-1)
        return self.wavlm_audio_proj(joined), counts
