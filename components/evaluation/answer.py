"""Let a model answer: prompts in batches of nearly equal length, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from components.batching.loader import pad_id
from models.batch import collate
from models.contract import SpeechLLM
from models.recipe import Decoding
from models.rendering import Audio, Message

BATCH_TOKENS = 2048  # of prompts, padding included
SPARE_TOKENS = 6  # that an answer may have beyond decoding.tokens_per_second


def answer_all(
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    clips: Sequence[Sequence[Audio]],
    seconds: Sequence[float],
    decoding: Decoding,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answers in the order of the prompts, about the clips of each; the result of one does not depend on the others.

    An answer is cut at `SPARE_TOKENS + decoding.tokens_per_second x seconds` tokens, so that an untrained model that
    never stops costs no more than its clip.
    """
    rendered = [model.render(tokenizer, prompt, heard) for prompt, heard in zip(prompts, clips, strict=True)]
    order = sorted(range(len(rendered)), key=lambda i: (len(rendered[i]), i))
    device = next(model.parameters()).device
    answers = [""] * len(rendered)
    done = 0
    for rows in batches_of(order, [len(r) for r in rendered]):
        limit = min(
            decoding.max_new_tokens, round(SPARE_TOKENS + decoding.tokens_per_second * max(seconds[i] for i in rows))
        )
        batch = collate([(rendered[i], clips[i]) for i in rows], pad_id(tokenizer), "left").to(device)
        for i, ids in zip(rows, model.generate(batch, decoding, tokenizer, limit), strict=True):
            answers[i] = model.read_answer(tokenizer, ids)
        done += len(rows)
        progress(done)
    return answers


def answer(
    model: SpeechLLM,
    tokenizer: PreTrainedTokenizerBase,
    waveform: torch.Tensor,
    prompt: list[Message],
    decoding: Decoding,
) -> str:
    """Answer about one recording, `(samples,)` at 16 kHz, with the model's own encoders."""
    return answer_all(model, tokenizer, [prompt], [model.listen([waveform])], [len(waveform) / 16_000], decoding)[0]


def batches_of(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Neighbours in `order` (shortest first) whose padded rows are at most `BATCH_TOKENS` tokens."""
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[i] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
