"""What is trained when: pydantic models of a recipe, serialisable to YAML and shown by `earloom recipe show`.

A recipe is the paper's training section as data: stages in order, each with what is trainable, the task
mixture, the optimiser and the stop rule. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Declared(BaseModel):
    """Base of everything a person may write in a recipe: unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Optimiser(Declared):
    """AdamW with a schedule over the steps of the stage."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0 = never")
    warmup: float = Field(0.0, ge=0, description="steps; below 1: share of all steps")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    final_lr: float = Field(0.0, ge=0, description="where the schedule ends")


class Curriculum(Declared):
    """In which order the samples of an epoch come."""

    order: Literal["random", "duration", "text"] = Field("random", description="random, or short clips / texts first")
    reverse: bool = False
    epochs: int = Field(1, ge=0, description="how many epochs keep the order; then random")


class Stage(Declared):
    """One stage of a recipe."""

    name: str
    train: tuple[str, ...] = Field(description="parameter groups that learn: connector, lora, llm, embeddings, encoder")
    tasks: dict[str, float] = Field({"asr": 1.0}, description="task -> weight; see components/curriculum/tasks.py")
    loss: Literal["lm", "ctc"] = Field("lm", description="next token on the labels, or CTC of the connector's output")
    optimiser: Optimiser = Field(default_factory=Optimiser)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="stop here even if epochs are left")
    batch_tokens: int = Field(1024, gt=0, description="tokens of a global batch, audio included")
    max_tokens: int = Field(2048, gt=0, description="longer samples are left out and counted")
    layout: Literal["bucketed", "packed"] = "bucketed"
    curriculum: Curriculum = Field(default_factory=Curriculum)
    checkpoint_every: int = Field(50, gt=0, description="steps")


class Decoding(Declared):
    """How answers are generated."""

    beams: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    tokens_per_second: float = Field(6.0, gt=0, description="answers to audio are cut at 6 + this x seconds tokens")
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Recipe(Declared):
    """The stages of an architecture's preset, and how its answers are decoded."""

    stages: list[Stage]
    decoding: Decoding = Field(default_factory=Decoding)
    seed: int = 0

    @model_validator(mode="after")
    def names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        return self
