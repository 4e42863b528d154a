"""What a batch is learnt by: each objective takes a model and a batch and gives a summed loss and its number of labels.

A stage names one; `SpeechLLM.forward` calls it, so that it runs inside whatever wraps the model (DDP, FSDP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.alignment import connector_ctc
from models.batch import Batch
from models.rendering import IGNORED

if TYPE_CHECKING:
    from models.contract import SpeechLLM

Objective = Callable[["SpeechLLM", Batch], tuple[Tensor, Tensor]]


def next_token(model: SpeechLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next token; logits are made only where labels are."""
    hidden, batch = model.run(batch)
    targets = batch.targets()
    at = targets != IGNORED
    logits = model.llm.get_output_embeddings()(hidden[at])
    return nn.functional.cross_entropy(logits.float(), targets[at], reduction="sum"), at.sum()


@dataclass(frozen=True)
class ConnectorCTC:
    """CTC of the connector's output against rows of the backbone's embedding table, without a pass through it.

    vocabulary: sorted ids that labels use, `blank` among them.
    """

    vocabulary: Tensor
    blank: int

    def __call__(self, model: SpeechLLM, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, counts = model.connect(*model.sound(batch))
        labels = _without_end(batch)
        table = model.llm.get_input_embeddings().weight
        loss = connector_ctc(tokens, counts, labels, table, self.vocabulary, self.blank)
        return loss, torch.tensor(sum(map(len, labels)))


@dataclass(frozen=True)
class LetterCTC:
    """CTC of the letters that a connector reads off its frames (`SpeechLLM.spell`), against the labels' UTF-8 bytes.

    Class 0 is the blank, class 1 + b the byte b. The backbone is not run.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, model: SpeechLLM, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, counts = model.spell(*model.sound(batch))
        labels = _without_end(batch)
        letters = [self.tokenizer.decode(row.tolist()).strip().lower().encode() for row in labels]
        loss = nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            torch.tensor([1 + letter for word in letters for letter in word]),
            counts,
            torch.tensor([len(word) for word in letters]),
            reduction="sum",
            zero_infinity=True,
        )
        return loss, torch.tensor(sum(map(len, labels)))


def branch_likelihoods(model: SpeechLLM, batch: Batch, most: int) -> Tensor:
    """Log-probability of the labels of each branch, `(rows, most)`, for rows of one beginning with several ends."""
    hidden, batch = model.run(batch)
    assert batch.branches is not None
    branches = batch.branches
    columns = torch.arange(branches.shape[1], device=branches.device)
    trunk_end = ((batch.segments > 0) & (branches == 0)).sum(1, keepdim=True) - 1
    goes_on = torch.zeros_like(branches, dtype=torch.bool)
    goes_on[:, 1:] = branches[:, 1:] == branches[:, :-1]
    before = torch.where(goes_on, columns - 1, trunk_end)  # what predicts a token: the one before it in its branch
    at = (branches > 0) & (batch.labels != IGNORED)
    rows = at.nonzero()[:, 0]
    each = _log_probabilities(model, hidden[rows, before[at]], batch.labels[at])
    sums = each.new_zeros(len(branches) * most).index_add(0, rows * most + branches[at] - 1, each)
    return sums.view(len(branches), most)


def log_likelihoods(model: SpeechLLM, batch: Batch) -> Tensor:
    """Log-probability of each sample's labels, `(samples,)`."""
    hidden, batch = model.run(batch)
    targets = batch.targets()
    at = targets != IGNORED
    each = _log_probabilities(model, hidden[at], targets[at])
    return each.new_zeros(batch.samples).index_add(0, batch.segments[at] - 1, each)


def _log_probabilities(model: SpeechLLM, states: Tensor, tokens: Tensor) -> Tensor:
    """Of each token after the state that predicts it, `(tokens, width)` and `(tokens,)` → `(tokens,)`."""
    logits = model.llm.get_output_embeddings()(states)
    return -nn.functional.cross_entropy(logits.float(), tokens, reduction="none")


def _without_end(batch: Batch) -> list[Tensor]:
    """The labels of each sample that CTC aligns; the last one, whichever token ends an answer, is not spoken."""
    return [row[row != IGNORED][:-1] for row in batch.label_sequences()]
