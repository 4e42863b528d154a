"""BEATs: patches of a filter-bank spectrogram through a transformer with gated relative positions.

Source: arXiv 2212.09058 and the layout of the public checkpoints (iter3+ AS2M, fine-tuned). A token is a patch of
16 frames by 16 mel bins; the tokens of one time patch follow each other, low frequencies first: 8 x 6.25 = 50 a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.encoders.base import SAMPLE_RATE, AudioEncoder, EncoderSpec
from models.encoders.frontend import FFT, HOP, kaldi_fbank, kaldi_frames
from models.encoders.loading import check_layer, fill, load_weights, read_json, valid_mask
from models.pretrained import resolve, seeded

BINS = 128
MEAN, DEVIATION = 15.41663, 6.55582
LOUDNESS = 2.0**15
GATE_PARTS = 8
VARIANT = {"layer_norm_first": False, "deep_norm": True, "relative_position_embedding": True, "gru_rel_pos": True}


@dataclass(frozen=True)
class BeatsConfig:
    """Sizes, named as in the checkpoints' own configuration. `finetuned_model`: with the classifier's weights."""

    input_patch_size: int = 16
    embed_dim: int = 512
    conv_bias: bool = False
    encoder_layers: int = 12
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    conv_pos: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    finetuned_model: bool = True
    predictor_class: int = 527

    @classmethod
    def of(cls, entries: dict[str, Any]) -> BeatsConfig:
        """Takes the entries that are sizes; those of training (dropout, masks) say nothing about the features.

        Raises ValueError for a variant that the public iter3 and iter3+ models are not.
        """
        for name, value in VARIANT.items():
            if bool(entries.get(name, value)) != value:
                raise ValueError(f"BEATs with {name}={entries[name]} is not supported; only {name}={value}")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in entries.items() if name in names})


class PositionConvolution(nn.Module):
    """Grouped convolution over the tokens, weight normalised along the kernel; keeps the length."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.conv_pos
        self.groups, self.kernel = config.conv_pos_groups, kernel
        self.bias = nn.Parameter(torch.zeros(width))
        self.weight_v = nn.Parameter(torch.randn(width, width // self.groups, kernel) * math.sqrt(4 / (kernel * width)))
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))

    def forward(self, tokens: Tensor) -> Tensor:
        norm = self.weight_v.square().sum((0, 1), keepdim=True).sqrt()
        weight = self.weight_v * (self.weight_g / norm)
        moved = functional.conv1d(
            tokens.transpose(1, 2), weight, self.bias, padding=self.kernel // 2, groups=self.groups
        )
        return functional.gelu(moved[..., : tokens.shape[1]]).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention whose relative bias is scaled by a gate computed from the query."""

    def __init__(self, config: BeatsConfig, relative: nn.Embedding) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.buckets, self.distance = config.num_buckets, config.max_distance
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.heads, GATE_PARTS)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        self.relative_attention_bias = relative

    def position_bias(self, size: int) -> Tensor:
        """Bias by distance, `(1, heads, size, size)`: exact near, logarithmic far, apart for the two directions."""
        at = torch.arange(size, device=self.grep_a.device)
        offset = at[None, :] - at[:, None]
        half = self.buckets // 2
        exact = half // 2
        near = offset.abs()
        beyond = (near.clamp_min(1) / exact).log() / math.log(self.distance / exact) * (half - exact)
        far = (exact + beyond.long()).clamp_max(half - 1)
        bucket = torch.where(near < exact, near, far) + (offset > 0).long() * half
        bias: Tensor = self.relative_attention_bias(bucket)
        return bias.permute(2, 0, 1)[None]

    def forward(self, tokens: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` is True for keys nobody may see, `(batch, 1, 1, size)`."""
        batch, size, width = tokens.shape
        query, key, value = (
            layer(tokens).view(batch, size, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        parts = self.grep_linear(query).view(batch, self.heads, size, 2, GATE_PARTS // 2).sum(-1).sigmoid()
        gate_a, gate_b = parts.chunk(2, dim=-1)
        bias = (gate_a * (gate_b * self.grep_a - 1.0) + 2.0) * position
        bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, size, width))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input scaled by (2 x layers)^(1/4), then normalised (DeepNorm)."""

    def __init__(self, config: BeatsConfig, relative: nn.Embedding) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.residual = (2.0 * config.encoder_layers) ** 0.25
        self.self_attn = Attention(config, relative)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = (
            nn.Linear(width, config.encoder_ffn_embed_dim),
            nn.Linear(config.encoder_ffn_embed_dim, width),
        )
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.self_attn_layer_norm(tokens * self.residual + self.self_attn(tokens, position, hidden))
        inner = self.fc2(functional.gelu(self.fc1(tokens)))
        return self.final_layer_norm(tokens * self.residual + inner)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The layers with their position convolution; all layers share one table of relative biases."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        relative = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        self.pos_conv = nn.Sequential(PositionConvolution(config))
        self.layers = nn.ModuleList([Layer(config, relative) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)

    def forward(self, tokens: Tensor, valid: Tensor, layer: int | None) -> Tensor:
        tokens = tokens * valid[..., None].to(tokens.dtype)
        tokens = self.layer_norm(tokens + self.pos_conv(tokens))
        position = self.layers[0].self_attn.position_bias(tokens.shape[1])  # type: ignore[operator, union-attr]
        for block in self.layers[:layer]:
            tokens = block(tokens, position, ~valid[:, None, None])
        return tokens


class Layers(nn.Module):
    """The module whose parameters have the names of the public checkpoints."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, stride=patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        same = config.embed_dim == config.encoder_embed_dim
        self.post_extract_proj = None if same else nn.Linear(config.embed_dim, config.encoder_embed_dim)
        self.encoder = Transformer(config)
        self.predictor = nn.Linear(config.encoder_embed_dim, config.predictor_class) if config.finetuned_model else None

    def forward(self, spectra: Tensor, counts: Tensor, layer: int | None) -> Tensor:
        """`(batch, frames, 128)` and valid tokens `(batch,)` → `(batch, tokens, width)`."""
        tokens = self.layer_norm(self.patch_embedding(spectra[:, None]).flatten(2).transpose(1, 2))
        tokens = tokens if self.post_extract_proj is None else self.post_extract_proj(tokens)
        return self.encoder(tokens, valid_mask(counts, tokens.shape[1]), layer)  # type: ignore[no-any-return]


class BeatsEncoder(AudioEncoder):
    """`spec.weights` is a public checkpoint (`.pt`), or a folder with config.json and safetensors under its names.

    `spec.config` holds entries of BeatsConfig. Clips too short for one patch (0.175 s) are padded with silence.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        entries, weights, source = read_weights(spec.weights) if spec.weights else ({}, None, Path())
        config = BeatsConfig.of(entries | spec.config)
        check_layer(spec.layer, config.encoder_layers)
        self.spec = spec
        self.width = config.encoder_embed_dim
        self.patch = config.input_patch_size
        self.shortest = FFT + (self.patch - 1) * HOP
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / HOP / self.patch * (BINS // self.patch))
        with seeded(spec.seed):
            self.layers = Layers(config)
        if weights is not None:
            fill(self.layers, weights, source)
        self.eval()

    def load_checkpoint(self, path: Path) -> None:
        """Fills the weights from a public checkpoint of the same sizes. Raises ValueError if it does not fit."""
        fill(self.layers, read_checkpoint(path)[1], path)

    def frames_of(self, samples: int) -> int:
        return kaldi_frames(max(samples, self.shortest)) // self.patch * (BINS // self.patch)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        device = self.device
        spectra = [self.spectrum(row[: int(n)].to(device)) for row, n in zip(waveforms, lengths, strict=True)]
        counts = torch.tensor([self.frames_of(int(n)) for n in lengths], device=device)
        batch = nn.utils.rnn.pad_sequence(spectra, batch_first=True)
        return self.layers(batch, counts, self.spec.layer)  # type: ignore[no-any-return]

    def spectrum(self, clip: Tensor) -> Tensor:
        """One clip, `(samples,)` → `(frames, 128)`, shifted and scaled by the constants of the pre-training set."""
        clip = functional.pad(clip, (0, max(0, self.shortest - len(clip))))
        return (kaldi_fbank(clip * LOUDNESS, BINS) - MEAN) / (2 * DEVIATION)

    def preprocessing(self) -> dict[str, Any]:
        bank = {"bins": BINS, "kind": "kaldi", "scale": LOUDNESS, "mean": MEAN, "deviation": 2 * DEVIATION}
        return super().preprocessing() | {"fbank": bank, "order": "time, then frequency"}


def read_weights(reference: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """Configuration, tensors and where they came from, of a `.pt` file or a folder."""
    path = Path(reference).expanduser()
    if path.suffix == ".pt":
        return *read_checkpoint(path), path
    folder = resolve(reference)
    return read_json(folder / "config.json"), load_weights(folder, ("",)), folder


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `cfg` and `model` of a public checkpoint; nothing in the file is executed.

    Raises FileNotFoundError if it is missing and ValueError if it holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; download the fine-tuned BEATs iter3+ (AS2M) checkpoint to that place"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = dict(content["cfg"]), dict(content["model"])
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for files that are none
        raise ValueError(f"{path} is no BEATs checkpoint (cfg and model as plain values): {error}") from error
    return {"finetuned_model": False} | config, {name: value.float() for name, value in weights.items()}
