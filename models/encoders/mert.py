"""MERT (Li et al., 2024, arXiv 2306.00107): a HuBERT for music at 24 kHz, 75 frames a second.

m-a-p/MERT-v1-330M: 24 pre-norm blocks of width 1024, group normalisation in the front end. Its published code adds to
HuBERT's a constant-Q front end and DeepNorm, which the v1 models do not use, and scales attention scores down and up
again around the softmax, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import soxr
import torch
from torch import Tensor
from torch.nn import functional

from models.encoders.base import SAMPLE_RATE
from models.encoders.hubert import WaveformTransformer

RATE = 24_000
TRAINED_WITH = ("attention_relax", "sample_rate", "feature_extractor_cqt_bins", "use_weighted_layer_sum")


class MertEncoder(WaveformTransformer):
    """`spec.config` holds entries of HubertConfig, `do_normalize` (on by default), and

    `longest_seconds`: what lies behind is not heard (MU-LLaMA hears 60 s; by default everything is);
    `last_normalised`: the last block's state, where `layers` keep it, goes through the LayerNorm behind the blocks. So
    transformers 4 returned it, and so it stands among MU-LLaMA's 25 states.
    """

    rate = RATE

    def normalises(self, features: dict[str, Any]) -> bool:
        return bool(features.get("do_normalize", True))

    def take(self, entries: dict[str, Any]) -> None:
        for name in ("feature_extractor_cqt", "deepnorm"):
            if entries.pop(name, False):
                raise ValueError(f"MERT with {name} is not supported: the v1 models do without")
        for name in TRAINED_WITH:
            entries.pop(name, None)
        self.longest: float | None = entries.pop("longest_seconds", None)
        self.last_normalised = bool(entries.pop("last_normalised", False))

    def heard(self, samples: int) -> int:
        return resampled_length(self.kept_samples(samples))

    def kept_samples(self, samples: int) -> int:
        """Samples at 16 kHz that are heard of a clip."""
        return samples if self.longest is None else min(samples, int(self.longest * SAMPLE_RATE))

    def prepare(self, clip: Tensor) -> Tensor:
        return super().prepare(resample(clip[: self.kept_samples(len(clip))]))

    def run(self, clip: Tensor) -> Iterator[Tensor]:
        config, norm = self.model.config, self.model.encoder.layer_norm
        last = config.num_hidden_layers if self.last_normalised and config.do_stable_layer_norm else None
        for layer, state in zip(self.spec.layers or (None,), super().run(clip), strict=True):
            yield norm(state) if layer is not None and layer == last else state

    def preprocessing(self) -> dict[str, Any]:
        return super().preprocessing() | {"resampled": "soxr HQ", "longest_seconds": self.longest}


def resampled_length(samples: int) -> int:
    """Samples at 24 kHz for `samples` at 16 kHz, halves rounded up."""
    return (3 * samples + 1) // 2


def resample(clip: Tensor) -> Tensor:
    """16 kHz → 24 kHz, `(samples,)` → `(resampled_length(samples),)`, by soxr on the CPU."""
    if not len(clip):
        return clip
    found = torch.from_numpy(soxr.resample(clip.detach().cpu().numpy(), SAMPLE_RATE, RATE))
    size = resampled_length(len(clip))
    return functional.pad(found[:size], (0, max(0, size - len(found)))).to(clip.device)
