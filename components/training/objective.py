"""What a stage learns by, as the objective that its recipe names."""

from __future__ import annotations

from typing import Any

import torch

from components.batching.loader import StageData
from components.training.expected_errors import ExpectedWordErrors
from models.objectives import ConnectorCTC, LetterCTC, Objective, next_token
from models.recipe import Stage


def objective_of(stage: Stage, data: StageData, tokenizer: Any) -> Objective:
    """The stage's loss as a function of model and batch; the CTC vocabulary is the tokens that its labels use."""
    if stage.loss == "lm":
        return next_token
    if stage.loss == "letters":
        return LetterCTC(tokenizer)
    if stage.loss == "mwer":
        return ExpectedWordErrors(tokenizer, stage.mwer)
    blank = int(tokenizer.eos_token_id)
    used = torch.from_numpy(data.samples.label_ids.copy())
    return ConnectorCTC(torch.unique(torch.cat([used, torch.tensor([blank])])), blank)
