"""Parakeet's encoder, a Fast Conformer (arXiv 2305.05084): log-mel, three halving convolutions, 12.5 frames a second.

Layers and weights are transformers' ParakeetEncoder (nvidia/parakeet-ctc-0.6b, -1.1b); the front end is that of its
ParakeetFeatureExtractor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ParakeetEncoder as Layers
from transformers import ParakeetEncoderConfig

from models.encoders.base import SAMPLE_RATE, EncoderSpec, LayeredEncoder, run_blocks
from models.encoders.frontend import FFT, HOP, NEMO_FFT, nemo_mel
from models.encoders.loading import check_layers, fill, load_weights, read_json, valid_mask
from models.pretrained import resolve, seeded

SHORTEST = 2 * HOP  # the variance of a bin needs two frames
PREFIXES = ("model.encoder.", "encoder.")


class ParakeetEncoder(LayeredEncoder):
    """`spec.config` holds entries of ParakeetEncoderConfig. Clips below 20 ms are padded with silence."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        folder = resolve(spec.weights) if spec.weights else None
        entries = read_json(folder / "config.json") if folder else {}
        config = ParakeetEncoderConfig(**entries.get("encoder_config", entries) | spec.config)
        check_layers(spec, config.num_hidden_layers)
        self.spec = spec
        self.width = spec.kept * config.hidden_size
        self.frame_rate = spec.pooled_rate(SAMPLE_RATE / HOP / config.subsampling_factor)
        with seeded(spec.seed):
            self.layers = Layers(config)
        if folder:
            fill(self.layers, load_weights(folder, PREFIXES), folder)
        self.eval()

    def frames_of(self, samples: int) -> int:
        return self.subsampled(max(samples, SHORTEST) // HOP)

    def subsampled(self, frames: int) -> int:
        """Frames behind the convolutions for `frames` of 10 ms."""
        kernel, stride = self.layers.config.subsampling_conv_kernel_size, self.layers.config.subsampling_conv_stride
        for _ in range(self.layers.subsampling.num_layers):
            frames = (frames + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        return frames

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        device = self.device
        mels = [self.mel(row[: int(n)].to(device)) for row, n in zip(waveforms, lengths, strict=True)]
        sizes = torch.tensor([len(mel) for mel in mels], device=device)
        batch = nn.utils.rnn.pad_sequence(mels, batch_first=True)
        state = self.layers.subsampling(batch, valid_mask(sizes, batch.shape[1])) * self.layers.input_scale
        positions = self.layers.encode_positions(state)
        counts = torch.tensor([self.subsampled(len(mel)) for mel in mels], device=device)
        valid = valid_mask(counts, state.shape[1])
        attended = (valid[:, :, None] & valid[:, None, :])[:, None]
        state = functional.dropout(state, self.layers.dropout, self.training)
        positions = functional.dropout(positions, self.layers.dropout_positions, self.training)
        given = {"attention_mask": attended, "position_embeddings": positions}
        yield from run_blocks(self.spec, state, self.layers.layers, lambda block, state: block(state, **given))

    def mel(self, clip: Tensor) -> Tensor:
        """One clip, `(samples,)` → `(frames, bins)`."""
        return nemo_mel(functional.pad(clip, (0, max(0, SHORTEST - len(clip)))), self.layers.config.num_mel_bins)

    def preprocessing(self) -> dict[str, Any]:
        mel = {"bins": self.layers.config.num_mel_bins, "fft": NEMO_FFT, "window": FFT, "hop": HOP, "kind": "nemo"}
        return super().preprocessing() | {"mel": mel, "normalised": "each bin over the clip"}
