"""AdamW over the parameter groups that a stage trains, each with its own settings and schedule."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from components.training.schedule import learning_rate
from models.contract import SpeechLLM
from models.recipe import Optimiser, Stage


def settings_of(stage: Stage, group: str) -> Optimiser:
    """The optimiser settings of a parameter group."""
    return stage.groups.get(group, stage.optimiser)


def build_optimiser(model: SpeechLLM, stage: Stage) -> torch.optim.AdamW:
    """AdamW over everything that `model.freeze(stage.train)` lets learn.

    Raises ValueError if the stage has settings for a group that it does not train.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = []
    for group, names in model.parameter_groups().items():
        members = [parameters[name] for name in names if name in parameters]
        if members:
            own = settings_of(stage, group)
            groups.append({"params": members, "group": group, "betas": own.betas, "weight_decay": own.weight_decay})
    idle = set(stage.groups) - {str(group["group"]) for group in groups}
    if idle:
        raise ValueError(f"stage {stage.name!r} has settings for groups it does not train: {', '.join(sorted(idle))}")
    sharded = any(isinstance(p, DTensor) for p in parameters.values())
    return torch.optim.AdamW(groups, lr=stage.optimiser.lr, fused=not sharded)


def set_rates(optimiser: torch.optim.Optimizer, stage: Stage, step: int, steps: int) -> float:
    """Set the learning rate of each group at `step` (from 0) of `steps`; returns that of the stage's own settings."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(settings_of(stage, group["group"]), step, steps)
    return learning_rate(stage.optimiser, step, steps)
