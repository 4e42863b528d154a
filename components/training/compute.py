"""How the steps of a stage are computed: settings that change speed and memory, not what is learnt."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models.recipe import Declared


class Compute(Declared):
    """Settings of the machines, apart from the recipe: a stage means the same with any of them."""

    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several workers: a whole model in each (DDP), or its layers spread over them (FSDP2)"
    )
    micro_tokens: int = Field(
        0,
        ge=0,
        description="tokens that are computed at a time; a larger share of a global batch is accumulated. "
        "0 = what `earloom fit-memory` found, else the whole share",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; auto: bfloat16 where the processor has it"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, a third slower")
    compile: bool = Field(False, description="torch.compile the backbone's layers: a minute to start, then faster")
    tensorboard: bool = Field(False, description="also write TensorBoard event files beside the stage's metrics")
