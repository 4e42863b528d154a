"""What is trained when: pydantic models of a recipe, serialisable to YAML and shown by `earloom recipe show`.

A recipe is the paper's training section as data: stages in order, each with what is trainable, the task
mixture, the optimiser and the stop rule. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Declared(BaseModel):
    """Base of everything a person may write in a recipe: unknown keys are an error."""

    model_config = ConfigDict(defer_build=True, extra="forbid", validate_assignment=True)


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
    """In which order the samples of an epoch come, each of them once whatever is set here.

    `sorted` pacing takes them strictly in order. The others are the competence functions of Platanios et al. (NAACL
    2019): at a share t of the epoch, samples are drawn at random from the easiest c(t) of them.
    linear: c = start + (1 - start) t. root: c = sqrt(start² + (1 - start²) t). step: `levels` equal steps.
    """

    order: str = Field(
        "random",
        description="random; what is easy: duration, text, tokens, rate (letters a second), a numeric column of the "
        "index; or tasks (in the recipe's order), modality (text, then audio)",
    )
    pacing: Literal["sorted", "linear", "root", "step"] = "sorted"
    start: float = Field(0.1, gt=0, le=1, description="share of the samples that a paced curriculum starts with")
    levels: int = Field(5, ge=1, description="steps of the step pacing")
    reverse: bool = False
    epochs: int = Field(1, ge=0, description="how many epochs keep the order; then random")


Loss = Literal["lm", "ctc", "letters", "mwer"]


class ExpectedErrors(Declared):
    """Minimum word error rate training (Prabhavalkar et al., 2018) on answers that the model samples itself."""

    hypotheses: int = Field(4, ge=2, description="answers sampled for a clip")
    cross_entropy: float = Field(0.01, ge=0, description="weight of the next-token loss beside it")
    keyword_weight: float = Field(1.0, ge=1, description="errors on words of the prompt's context count so often")


class Stage(Declared):
    """One stage of a recipe: mixture × freeze plan × optimiser × curriculum × stop rule."""

    name: str
    train: tuple[str, ...] = Field(description="parameter groups that learn: connector, lora, llm, embeddings, encoder")
    tasks: dict[str, float] = Field({"asr": 1.0}, description="task -> weight; see components/curriculum/tasks.py")
    datasets: dict[str, float] = Field(
        default_factory=dict, description="data set (first folder of the recordings' paths) -> weight; others 1"
    )
    temperature: float = Field(
        1.0, gt=0, description="over data sets: shares go as size^(1/temperature); 1 = as they are, higher = more even"
    )
    phrasings: int = Field(
        1, ge=0, description="wordings of a request that are used, drawn from a clip's key; 0: Qwen-Audio's tags"
    )
    shots: int = Field(0, ge=0, description="other clips with their answers before the one that is asked about")
    nearest: bool = Field(False, description="shots are those that sound most alike, not drawn ones")
    loss: Loss = Field(
        "lm",
        description="next token on the labels (lm); CTC of the connector's output (ctc) or of its letters (letters); "
        "expected word errors of sampled answers (mwer)",
    )
    mwer: ExpectedErrors = Field(default_factory=lambda: ExpectedErrors(), description="of the loss mwer")
    optimiser: Optimiser = Field(default_factory=Optimiser)
    groups: dict[str, Optimiser] = Field(
        default_factory=dict, description="parameter group -> its own optimiser, where it differs from the stage's"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="stop here even if epochs are left")
    max_seconds: float | None = Field(None, gt=0, description="stop after this much training time")
    patience: int | None = Field(
        None, gt=0, description="stop when the loss on the dev split has not improved for so many checkpoints"
    )
    batch_tokens: int = Field(1024, gt=0, description="tokens of a global batch, audio included")
    max_tokens: int = Field(2048, gt=0, description="longer samples are left out and counted")
    layout: Literal["auto", "bucketed", "packed"] = Field(
        "auto",
        description="rows of nearly equal length, or one row without padding; auto: the device's faster one",
    )
    mixing: int = Field(16, gt=0, description="shards whose samples are mixed at a time; reads stay within them")
    curriculum: Curriculum = Field(default_factory=Curriculum, description="'none' for a random order")
    checkpoint_every: int = Field(50, gt=0, description="steps")
    skip_batches: int = Field(3, ge=0, description="batches whose loss is not finite are skipped, at most so many")

    @field_validator("curriculum", mode="before")
    @classmethod
    def no_curriculum(cls, given: Any) -> Any:
        return {} if given in ("none", None) else given


class Decoding(Declared):
    """How answers are generated."""

    beams: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    tokens_per_second: float = Field(6.0, gt=0, description="answers to audio are cut at 6 + this x seconds tokens")
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    shots: int = Field(0, ge=0, description="clips of the train split that are shown with their answers")
    nearest: bool = Field(False, description="those that sound most alike")


class Recipe(Declared):
    """The stages of an architecture's preset, and how its answers are decoded."""

    stages: list[Stage]
    decoding: Decoding = Field(default_factory=Decoding)
    seed: int = 0

    @property
    def hears(self) -> list[bool]:
        """For each stage whether it takes the audio itself: it trains an encoder, or one before it did.

        The others take features that were cached before training.
        """
        return [any("encoder" in stage.train for stage in self.stages[: n + 1]) for n in range(len(self.stages))]

    @model_validator(mode="after")
    def names_differ(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        return self
