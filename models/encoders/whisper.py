"""Whisper's encoder: log-mel, two convolutions, a transformer with fixed positions, 50 frames a second.

Source: arXiv 2212.04356; layers and weights are transformers' WhisperEncoder, whose own forward wants the full
window and ignores masks. `spec.window` keeps that; otherwise a clip is only as long as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Layers

from models.encoders.base import SAMPLE_RATE, EncoderSpec, LayeredEncoder, run_blocks
from models.encoders.frontend import FFT, HOP, log_mel, normalise
from models.encoders.loading import attention_bias, check_layers, fill, load_weights, read_json, valid_mask
from models.pretrained import resolve, seeded

PREFIXES = ("model.encoder.", "encoder.")
POSITIONS = "embed_positions.weight"


class WhisperEncoder(LayeredEncoder):
    """`spec.config` holds entries of WhisperConfig, and `do_normalize` (waveforms to zero mean and unit variance).

    A clip longer than the window (`max_source_positions` frames of 20 ms) is cut to it; a shorter window than the
    weights have uses their first positions. Clips below 400 samples are padded with silence.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        folder = resolve(spec.weights) if spec.weights else None
        entries = (read_json(folder / "config.json") if folder else {}) | spec.config
        features = read_json(folder / "preprocessor_config.json") if folder else {}
        self.normalised = bool(entries.pop("do_normalize", features.get("do_normalize", False)))
        config = WhisperConfig(**entries)
        check_layers(spec, config.encoder_layers)
        self.spec = spec
        self.width = spec.kept * config.d_model
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / HOP / 2)
        self.window: int = config.max_source_positions
        with seeded(spec.seed):
            self.layers = Layers(config)
        if folder:
            weights = load_weights(folder, PREFIXES)
            fill(self.layers, weights | {POSITIONS: weights[POSITIONS][: self.window]}, folder)
        self.eval()

    @property
    def longest(self) -> int:
        """Samples of the full window."""
        return self.window * 2 * HOP

    def frames_of(self, samples: int) -> int:
        if self.spec.window:
            return self.window
        return (min(max(samples, FFT), self.longest) // HOP + 1) // 2

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        device = self.device
        clips = [self.trim(row[: int(n)].to(device)) for row, n in zip(waveforms, lengths, strict=True)]
        bins = self.layers.num_mel_bins
        mels = [log_mel(clip, bins) for clip in clips]
        sizes = torch.tensor([mel.shape[-1] for mel in mels], device=device)
        batch = torch.stack([functional.pad(mel, (0, int(sizes.max()) - mel.shape[-1])) for mel in mels])
        frames = self.convolve(batch, sizes)
        bias = attention_bias(valid_mask((sizes + 1) // 2, frames.shape[1]))
        yield from run_blocks(
            self.spec, frames, self.layers.layers, lambda block, state: block(state, bias), self.layers.layer_norm
        )

    def trim(self, clip: Tensor) -> Tensor:
        """One clip, `(samples,)`: cut to the window, normalised if asked, then padded to the window or the minimum."""
        clip = clip[: self.longest]
        clip = normalise(clip) if self.normalised and len(clip) else clip
        size = self.longest if self.spec.window else FFT
        return functional.pad(clip, (0, max(0, size - len(clip))))

    def convolve(self, mels: Tensor, sizes: Tensor) -> Tensor:
        """`(batch, bins, mel frames)` → `(batch, frames, width)`; beyond a clip's end both convolutions see zeros."""
        hidden: Tensor = functional.gelu(self.layers.conv1(mels))
        hidden = hidden * valid_mask(sizes, hidden.shape[-1])[:, None].to(hidden.dtype)
        hidden = functional.gelu(self.layers.conv2(hidden)).transpose(1, 2)
        positions: Tensor = self.layers.embed_positions.weight
        return hidden + positions[: hidden.shape[1]]

    def preprocessing(self) -> dict[str, Any]:
        mel = {"bins": self.layers.num_mel_bins, "fft": FFT, "hop": HOP, "scale": "slaney", "log": "whisper"}
        return super().preprocessing() | {"mel": mel, "normalise": self.normalised, "window": self.window}
