"""Training on expected word errors: the model samples answers, and learns to make those with fewer errors likelier.

Prabhavalkar et al., "Minimum Word Error Rate Training for Attention-based Sequence-to-Sequence Models", ICASSP 2018:
the sum over a clip's hypotheses of their probability, renormalised among them, times their errors less the mean.
Errors on the words of a prompt's context may count more (Seed-ASR's weighted errors, arXiv 2407.04675).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.evaluation.normalise import normalise
from models.batch import Batch, Pair, collate
from models.contract import SpeechLLM
from models.objectives import log_likelihoods, next_token
from models.recipe import Decoding, ExpectedErrors
from models.rendering import IGNORED, Audio, Rendered

SPARE = 4  # tokens that a sampled answer may be longer than the right one


@dataclass(frozen=True)
class ExpectedWordErrors:
    """The objective: expected errors of each clip, weighed by its labels, and next-token loss beside them.

    Clips whose samples are all alike add the next-token loss alone.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: ExpectedErrors

    def __call__(self, model: SpeechLLM, batch: Batch) -> tuple[Tensor, Tensor]:
        features, lengths = model.sound(batch)
        pairs: list[Pair] = [(r, a) for r, a in batch.pairs(features, lengths)]
        cross_entropy, count = next_token(model, self._collated(pairs))
        loss = self.settings.cross_entropy * cross_entropy
        prompts = [_prompt(rendered) for rendered, _ in pairs]
        answers = [rendered.ids[len(prompt) :] for prompt, (rendered, _) in zip(prompts, pairs, strict=True)]
        audios = [audio for _, audio in pairs]
        asked = [i for i, answer in enumerate(answers) if answer]
        for i, sampled in zip(asked, self._sample(model, prompts, answers, audios, asked), strict=True):
            if len(sampled) < 2:
                continue
            errors = self._errors(model, prompts[i], answers[i], sampled)
            learnt: list[Pair] = [(_answered(prompts[i], ids, self._end), audios[i]) for ids in sampled]
            likelihoods, _ = log_likelihoods(model, self._collated(learnt))
            shares = likelihoods.softmax(0)
            expected = (shares * (errors - errors.mean()).to(shares)).sum()
            loss = loss + len(answers[i]) * expected
        return loss, count

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _collated(self, pairs: list[Pair], left: bool = False) -> Batch:
        """A batch where the features are, which may carry a gradient."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._end
        batch = collate(pairs, int(pad), "left" if left else "right")
        device = next((f.device for _, clips in pairs for clip in clips for f in clip.features.values()), None)
        return batch.to(device) if device is not None else batch

    def _sample(
        self,
        model: SpeechLLM,
        prompts: list[Rendered],
        answers: list[list[int]],
        audios: list[Sequence[Audio]],
        asked: list[int],
    ) -> list[list[list[int]]]:
        """Different sampled answers of each prompt, without end tokens; the random state is the step's."""
        times = self.settings.hypotheses
        pairs: list[Pair] = [(prompts[i], audios[i]) for i in asked for _ in range(times)]
        longest = max((len(answers[i]) for i in asked), default=0) + SPARE
        training = model.training
        model.eval()
        drawn = model.generate(self._collated(pairs, left=True), Decoding(sample=True), self.tokenizer, longest)
        model.train(training)
        each = [drawn[i * times : (i + 1) * times] for i in range(len(asked))]
        return [[list(ids) for ids in dict.fromkeys(map(tuple, group))] for group in each]

    def _errors(self, model: SpeechLLM, prompt: Rendered, answer: list[int], sampled: list[list[int]]) -> Tensor:
        context = {normalise(word) for word in model.keywords(self.tokenizer.decode(prompt.ids))}
        reference = normalise(model.read_answer(self.tokenizer, answer)).split()
        weights = [self.settings.keyword_weight if word in context else 1.0 for word in reference]
        said = [normalise(model.read_answer(self.tokenizer, ids)).split() for ids in sampled]
        return torch.tensor([weighted_errors(reference, words, weights) for words in said])


def weighted_errors(reference: list[str], hypothesis: list[str], weights: list[float]) -> float:
    """Least cost of edits from `hypothesis` to `reference`: a word of the reference that is wrong or missing costs its
    weight, a word too many costs 1."""
    row = np.arange(len(hypothesis) + 1, dtype=float)
    for word, weight in zip(reference, weights, strict=True):
        before, row = row, np.empty_like(row)
        row[0] = before[0] + weight
        for j, other in enumerate(hypothesis, 1):
            row[j] = min(before[j] + weight, row[j - 1] + 1.0, before[j - 1] + (0.0 if word == other else weight))
    return float(row[-1])


def _prompt(rendered: Rendered) -> Rendered:
    """The part before the first label."""
    first = next((i for i, label in enumerate(rendered.labels) if label != IGNORED), len(rendered))
    return Rendered(
        rendered.ids[:first],
        [IGNORED] * first,
        [at for at in rendered.audio_at if at < first],
        rendered.clip_at,
        rendered.clip_tokens,
        rendered.instruction,
    )


def _answered(prompt: Rendered, ids: list[int], end: int) -> Rendered:
    whole = Rendered(
        list(prompt.ids), list(prompt.labels), prompt.audio_at, prompt.clip_at, prompt.clip_tokens, prompt.instruction
    )
    return whole.tokens([*ids, end], learn=True)
