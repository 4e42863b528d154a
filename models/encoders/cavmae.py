"""CAV-MAE's audio branch as LTU uses it: patches of a 10.24 s filter-bank spectrogram through 12 transformer blocks.

Source: arXiv 2305.10790 section 3 and 2210.07839; names and figures from `CAVMAEFTAudio` of YuanGongND/ltu. The
output is always 8 frequency rows of 64 time steps, row after row, low frequencies first: 512 tokens, 50 a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models.encoders.base import SAMPLE_RATE, AudioEncoder, EncoderSpec
from models.encoders.frontend import FFT, HOP, kaldi_fbank
from models.encoders.loading import check_layer, fill
from models.encoders.public import prefix_of, read_published
from models.pretrained import seeded

MEAN, DEVIATION = -5.081, 4.4849
ANCHOR = "patch_embed_a.proj.weight"
AUDIO = ("patch_embed_a.", "pos_embed_a", "modality_a", "blocks_a.", "blocks_u.", "norm_a.")


class CavMaeConfig(BaseModel):
    """Sizes, named as in the official class; the defaults are the published ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    audio_length: int = Field(1024, ge=1, description="frames of 10 ms that a clip is padded or cut to")
    mel_bins: int = Field(128, ge=1)
    patch_size: int = Field(16, ge=1)
    embed_dim: int = Field(768, ge=4, multiple_of=4)
    depth: int = Field(12, ge=1, description="blocks in all")
    modality_specific_depth: int = Field(11, ge=0, description="of them: audio blocks before the joint ones")
    num_heads: int = Field(12, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.audio_length % self.patch_size or self.mel_bins % self.patch_size:
            raise ValueError(f"audio_length and mel_bins must be multiples of patch_size ({self.patch_size})")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.modality_specific_depth > self.depth:
            raise ValueError(f"modality_specific_depth must not exceed depth ({self.depth})")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of frequency and steps of time."""
        return self.mel_bins // self.patch_size, self.audio_length // self.patch_size


def grid_positions(rows: int, steps: int, width: int) -> Tensor:
    """2-D sine and cosine positions, `(rows x steps, width)`: the first half tells the step, the second the row.

    Each half is sin, then cos of the position over 10000^(i / (width / 4)). Source: MAE's `pos_embed.py`.
    """
    rates = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def waves(positions: int) -> Tensor:
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    return torch.cat([waves(steps).repeat(rows, 1), waves(rows).repeat_interleave(steps, 0)], dim=1).float()


class Attention(nn.Module):
    """Self-attention over all tokens, with one layer for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, size, width = tokens.shape
        parts = self.qkv(tokens).view(batch, size, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, size, width))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm ViT block with three pairs of norms: plain, for joint blocks on audio (`_a`), on images (`_v`)."""

    def __init__(self, config: CavMaeConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1, self.norm1_a, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        self.attn = Attention(width, config.num_heads)
        self.norm2, self.norm2_a, self.norm2_v = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, tokens: Tensor, joint: bool) -> Tensor:
        plain, audio = (self.norm1, self.norm2), (self.norm1_a, self.norm2_a)
        first, second = audio if joint else plain
        tokens = tokens + self.attn(first(tokens))
        tokens = tokens + self.mlp(second(tokens))
        if torch.is_grad_enabled():
            # As in the official block: a zero gradient rather than none, which distributed training would wait for.
            idle = (*(plain if joint else audio), self.norm1_v, self.norm2_v)
            tokens = tokens + 0.0 * torch.stack([norm.weight.sum() + norm.bias.sum() for norm in idle]).sum()
        return tokens


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Layers(nn.Module):
    """The module whose parameters have the names of the public checkpoints."""

    def __init__(self, config: CavMaeConfig) -> None:
        super().__init__()
        joint = config.depth - config.modality_specific_depth
        self.patch_embed_a = PatchEmbed(config.patch_size, config.embed_dim)
        self.pos_embed_a = nn.Parameter(grid_positions(*config.grid, config.embed_dim)[None])
        self.modality_a = nn.Parameter(0.02 * torch.randn(1, 1, config.embed_dim))
        self.blocks_a = nn.ModuleList([Block(config) for _ in range(config.modality_specific_depth)])
        self.blocks_u = nn.ModuleList([Block(config) for _ in range(joint)])
        self.norm_a = nn.LayerNorm(config.embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed_a.proj.weight.data.flatten(1))

    def forward(self, spectra: Tensor, layer: int | None) -> Tensor:
        """`(batch, frames, bins)` → `(batch, rows x steps, width)`, after block `layer` or after the last and norm."""
        tokens = self.patch_embed_a(spectra.transpose(1, 2)[:, None]) + self.pos_embed_a + self.modality_a
        blocks = [(block, False) for block in self.blocks_a] + [(block, True) for block in self.blocks_u]
        for block, joint in blocks[:layer]:
            tokens = block(tokens, joint)
        return self.norm_a(tokens) if layer is None else tokens  # type: ignore[no-any-return]


class CavMaeEncoder(AudioEncoder):
    """`spec.weights` is a public checkpoint, or a folder with config.json and safetensors under its names.

    A checkpoint may be CAV-MAE's own or LTU's (`.pth`, `.pt`, `.bin`; leading `module.` and the like are taken off, the
    image branch is left out). `spec.config` holds entries of CavMaeConfig. A clip is cut at 10.24 s, and what is
    missing is zero in the spectrogram before it is normalised, so it holds 1.133, as published.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        entries, state, source = read_published(spec.weights) if spec.weights else ({}, None, Path())
        known = {name: value for name, value in entries.items() if name in CavMaeConfig.model_fields}
        self.config = CavMaeConfig.model_validate(known | spec.config)
        check_layer(spec.layer, self.config.depth)
        self.spec = spec
        self.width = self.config.embed_dim
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / HOP / self.config.patch_size * self.config.grid[0])
        with seeded(spec.seed):
            self.layers = Layers(self.config)
        if state is not None:
            fill(self.layers, audio_branch(state, source), source)
        self.eval()

    def frames_of(self, samples: int) -> int:
        rows, steps = self.config.grid
        return rows * steps

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        device = self.device
        spectra = [self.spectrum(row[: int(n)].to(device)) for row, n in zip(waveforms, lengths, strict=True)]
        return self.layers(torch.stack(spectra), self.spec.layer)  # type: ignore[no-any-return]

    def spectrum(self, clip: Tensor) -> Tensor:
        """One clip, `(samples,)` → `(audio_length, mel_bins)`; clips below 400 samples are padded with silence."""
        clip = clip - clip.mean() if len(clip) else clip
        clip = clip[: FFT + (self.config.audio_length - 1) * HOP]
        clip = functional.pad(clip, (0, max(0, FFT - len(clip))))
        # the official `htk_compat` changes nothing without an energy column
        banks = kaldi_fbank(clip, self.config.mel_bins, "hanning")
        banks = functional.pad(banks, (0, 0, 0, self.config.audio_length - len(banks)))
        return (banks - MEAN) / DEVIATION

    def preprocessing(self) -> dict[str, Any]:
        bank = {"kind": "kaldi", "window": "hanning", "bins": self.config.mel_bins, "frames": self.config.audio_length}
        scale = {"padding": "zeros, then normalised", "mean": MEAN, "deviation": DEVIATION}
        order = {"waveform": "mean subtracted", "order": "frequency, then time"}
        return super().preprocessing() | order | {"fbank": bank | scale}


def audio_branch(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The audio encoder's tensors under their own names; those of other parts are left out.

    Raises ValueError, naming the source, if there is no audio encoder.
    """
    prefix = prefix_of(state, ANCHOR)
    if prefix is None:
        raise ValueError(f"{source} holds no CAV-MAE audio encoder: no name ends with {ANCHOR}")
    kept = tuple(prefix + name for name in AUDIO)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(kept)}
