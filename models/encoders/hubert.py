"""HuBERT and mHuBERT (Hsu et al., 2021): raw waveform in, 50 frames a second; used through one hidden layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel

from models.encoders.base import SAMPLE_RATE, AudioEncoder, EncoderSpec
from models.encoders.loading import check_layer
from models.pretrained import resolve, seeded

UNMASKED = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}  # SpecAugment is for training the encoder


class HubertEncoder(AudioEncoder):
    """transformers' HubertModel. fairseq's `output_layer=k` is `layer=k`: the state after the k-th block.

    The convolutional front end normalises over time, so clips run one by one: alone = batched.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.weights is None:
            with seeded(spec.seed):
                self.model = HubertModel(HubertConfig(**UNMASKED | spec.config))
        else:
            self.model = HubertModel.from_pretrained(resolve(spec.weights), dtype=torch.float32)
        check_layer(spec.layer, self.model.config.num_hidden_layers)
        self.width = self.model.config.hidden_size
        stride = 1
        for step in self.model.config.conv_stride:
            stride *= step
        self.frame_rate = SAMPLE_RATE / stride / spec.pool
        self.eval().requires_grad_(False)

    def frames_of(self, samples: int) -> int:
        frames = max(samples, self.shortest())
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            frames = (frames - kernel) // stride + 1
        return frames

    def shortest(self) -> int:
        """Samples that give one frame; shorter clips are zero-padded to it."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.model.config.conv_kernel), reversed(self.model.config.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        rows = [self._one(waveform[: int(n)]) for waveform, n in zip(waveforms, lengths, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _one(self, clip: Tensor) -> Tensor:
        clip = torch.nn.functional.pad(clip, (0, max(0, self.shortest() - len(clip))))
        states = self.model(clip[None], output_hidden_states=self.spec.layer is not None)
        kept = states.last_hidden_state if self.spec.layer is None else states.hidden_states[self.spec.layer]
        return kept[0]  # type: ignore[no-any-return]

    def preprocessing(self) -> dict[str, Any]:
        return {"input": "waveform", "sample_rate": SAMPLE_RATE, "normalised": False}
