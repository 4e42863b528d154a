"""Label tasks as a choice: which of the known labels the model finds likeliest as the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.batching.loader import pad_id
from components.curriculum.tasks import samples_of
from components.evaluation.answer import batches_of
from components.evaluation.normalise import normalise
from models.batch import Batch, Pair, collate, positions_of
from models.contract import SpeechLLM
from models.objectives import branch_likelihoods, log_likelihoods
from models.rendering import IGNORED, Audio, Message, Rendered

Tree = tuple[Rendered, list[Rendered]]  # a prompt, and the prompt with each answer

MOST = 32  # labels; with more of them a task is scored by its free answers alone


def options_of(rows: Iterable[dict[str, Any]], task: str) -> list[str]:
    """The labels that a task has in these rows, sorted; [] for tasks without labels or with more than `MOST`."""
    if not task.startswith("label:"):
        return []
    found = {sample.reference for row in rows for sample in samples_of(row, task)}
    return sorted(found, key=normalise) if 2 <= len(found) <= MOST else []


@torch.inference_mode()
def choose(
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    clips: Sequence[Sequence[Audio]],
    options: Sequence[str],
) -> list[str]:
    """The option with the highest log-probability as the answer, summed over its tokens, for each prompt.

    A row holds the prompt once and all options behind it, each of which sees the prompt and itself alone.
    """
    pad = pad_id(tokenizer)
    device = next(model.parameters()).device
    ends = [{"role": "assistant", "content": [{"type": "text", "text": option}]} for option in options]
    trees = []
    for prompt, heard in zip(prompts, clips, strict=True):
        trunk = model.render(tokenizer, prompt, heard)
        trees.append((trunk, [model.render(tokenizer, [*prompt, end], heard) for end in ends]))
    if model.llm.config.is_encoder_decoder:
        likelihoods = [_apart(model, branches, heard, pad) for (_, branches), heard in zip(trees, clips, strict=True)]
        return [options[int(each.argmax())] for each in likelihoods]
    sizes = [sum(map(len, branches)) - (len(branches) - 1) * len(trunk) for trunk, branches in trees]
    chosen = [""] * len(trees)
    for rows in batches_of(sorted(range(len(trees)), key=lambda i: sizes[i]), sizes):
        batch = _tree_batch([trees[i] for i in rows], [clips[i] for i in rows], pad).to(device)
        best = branch_likelihoods(model, batch, len(options)).argmax(1)
        for i, option in zip(rows, best.tolist(), strict=True):
            chosen[i] = options[option]
    return chosen


def _tree_batch(trees: Sequence[Tree], clips: Sequence[Sequence[Audio]], pad: int) -> Batch:
    """Rows of a prompt and what each option adds to it, one behind the other."""
    pairs: list[Pair] = []
    for (trunk, branches), heard in zip(trees, clips, strict=True):
        row = replace(trunk, ids=list(trunk.ids), labels=[IGNORED] * len(trunk))
        for branch in branches:
            row.ids += branch.ids[len(trunk) :]
            row.labels += branch.labels[len(trunk) :]
        pairs.append((row, heard))
    batch = collate(pairs, pad)
    numbers = torch.zeros_like(batch.segments)
    for row_number, (trunk, branches) in enumerate(trees):
        lengths = torch.tensor([len(trunk), *(len(branch) - len(trunk) for branch in branches)])
        order = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        numbers[row_number, : len(order)] = order
    return replace(batch, branches=numbers, positions=positions_of(batch.segments, numbers))


def _apart(model: SpeechLLM, branches: list[Rendered], heard: Sequence[Audio], pad: int) -> Tensor:
    """Log-probability of each option, `(options,)`, as samples of their own."""
    batch = collate([(branch, heard) for branch in branches], pad)
    return log_likelihoods(model, batch.to(next(model.parameters()).device))
