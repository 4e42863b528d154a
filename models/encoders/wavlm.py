"""WavLM (Chen et al., 2022, arXiv 2110.13900): HuBERT with gated relative positions, 50 frames a second."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel

from models.encoders.hubert import WaveformTransformer


class WavLMEncoder(WaveformTransformer):
    """transformers' WavLMModel. WavLLM keeps all 13 hidden states of the base model: `layers` 0 to 12."""

    model_class = WavLMModel
    config_class = WavLMConfig

    def project(self, hidden: Tensor) -> Tensor:
        return self.model.feature_projection(hidden)[0]  # type: ignore[no-any-return]

    def step(self, frames: int) -> Callable[[nn.Module, Tensor], Tensor]:
        # One table of relative positions, which the first block owns, serves all of them.
        bias = self.model.encoder.layers[0].attention.compute_bias(frames, frames)
        return lambda block, state: block(state, position_bias=bias)[0]
