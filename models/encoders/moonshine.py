"""Moonshine's encoder: a waveform through three convolutions and a rotary transformer, 41.7 frames a second.

Source: arXiv 2410.15608; layers and weights are transformers' MoonshineEncoder. Its group norm runs over the whole
time axis, so a padded clip would differ from one alone: here it is computed over the valid frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineEncoder as Layers

from models.encoders.base import SAMPLE_RATE, EncoderSpec, LayeredEncoder, run_blocks
from models.encoders.loading import attention_bias, check_layers, fill, load_weights, read_json, valid_mask
from models.pretrained import resolve, seeded

CONVOLUTIONS = ((127, 64), (7, 3), (3, 2))
STRIDE = 64 * 3 * 2
SHORTEST = 895
PREFIXES = ("model.encoder.", "encoder.")


def convolved(length: int, kernel: int, stride: int) -> int:
    return (length - kernel) // stride + 1


class MoonshineEncoder(LayeredEncoder):
    """`spec.config` holds entries of MoonshineConfig. Clips below 895 samples (56 ms) are padded with silence."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        folder = resolve(spec.weights) if spec.weights else None
        config = MoonshineConfig(**(read_json(folder / "config.json") if folder else {}) | spec.config)
        check_layers(spec, config.encoder_num_hidden_layers)
        self.spec = spec
        self.width = spec.kept * config.hidden_size
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / STRIDE)
        with seeded(spec.seed):
            self.layers = Layers(config)
        if folder:
            fill(self.layers, load_weights(folder, PREFIXES), folder)
        self.eval()

    def frames_of(self, samples: int) -> int:
        frames = max(samples, SHORTEST)
        for kernel, stride in CONVOLUTIONS:
            frames = convolved(frames, kernel, stride)
        return frames

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        device = self.device
        samples = lengths.clamp_min(SHORTEST).to(device)
        waveforms = waveforms.to(device).masked_fill(~valid_mask(lengths.to(device), waveforms.shape[1]), 0.0)
        waveforms = functional.pad(waveforms, (0, max(0, SHORTEST - waveforms.shape[1])))
        frames = self.convolve(waveforms, samples)
        counts = torch.tensor([self.frames_of(int(n)) for n in lengths], device=device)
        bias = attention_bias(valid_mask(counts, frames.shape[1]))
        positions = torch.arange(frames.shape[1], device=device)[None]
        rotary = self.layers.rotary_emb(frames, position_ids=positions)
        given = {"attention_mask": bias, "position_ids": positions, "position_embeddings": rotary}
        yield from run_blocks(
            self.spec, frames, self.layers.layers, lambda block, state: block(state, **given), self.layers.layer_norm
        )

    def convolve(self, waveforms: Tensor, samples: Tensor) -> Tensor:
        """`(batch, samples)` → `(batch, frames, width)`; valid frames see neither padding nor its statistics."""
        hidden = self.layers.conv1(waveforms[:, None]).tanh().float()  # sums over a clip, in every precision
        valid = valid_mask((samples - 127) // 64 + 1, hidden.shape[-1])[:, None].to(hidden.dtype)
        norm = self.layers.groupnorm
        count = valid.sum((1, 2), keepdim=True) * hidden.shape[1]
        mean = (hidden * valid).sum((1, 2), keepdim=True) / count
        variance = ((hidden - mean).square() * valid).sum((1, 2), keepdim=True) / count
        hidden = (hidden - mean) * (variance + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]
        hidden = functional.gelu(self.layers.conv2(hidden))
        return functional.gelu(self.layers.conv3(hidden)).transpose(1, 2).float()

    def preprocessing(self) -> dict[str, Any]:
        return super().preprocessing() | {"shortest": SHORTEST, "group_norm": "valid frames"}
