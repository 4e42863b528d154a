"""Label tasks as a choice: which of the known labels the model finds likeliest as the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from components.curriculum.tasks import samples_of
from components.evaluation.answer import batches_of
from components.evaluation.normalise import normalise
from models.batch import Pair, collate
from models.contract import SpeechLLM
from models.objectives import log_likelihoods
from models.rendering import Audio, Message

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
    """The option with the highest log-probability as the answer, summed over its tokens, for each prompt."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    pairs: list[Pair] = []
    for prompt, heard in zip(prompts, clips, strict=True):
        answers = [{"role": "assistant", "content": [{"type": "text", "text": option}]} for option in options]
        pairs += [(model.render(tokenizer, [*prompt, answer], heard), heard) for answer in answers]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    scores = torch.empty(len(pairs))
    for rows in batches_of(order, [len(rendered) for rendered, _ in pairs]):
        batch = collate([pairs[i] for i in rows], int(pad)).to(device)
        scores[rows] = log_likelihoods(model, batch)[0].float().cpu()
    return [options[int(best)] for best in scores.view(-1, len(options)).argmax(1)]
