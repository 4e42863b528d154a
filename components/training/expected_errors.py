"""Training on expected word errors: the model samples answers, and learns to make those with fewer errors likelier.

Prabhavalkar et al., "Minimum Word Error Rate Training for Attention-based Sequence-to-Sequence Models", ICASSP 2018:
the sum over a clip's hypotheses of their probability, renormalised among them, times their errors less the mean.
Errors on the words of a prompt's context may count more (Seed-ASR's weighted errors, arXiv 2407.04675).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.batching.loader import pad_id
from components.evaluation.normalise import normalise
from models.batch import Batch, Layout, collate
from models.contract import SpeechLLM
from models.objectives import log_likelihoods, next_token
from models.recipe import Decoding, ExpectedErrors
from models.rendering import IGNORED, Rendered

SPARE = 4  # tokens that a sampled answer may be longer than the right one


@dataclass(frozen=True)
class Asked:
    """One sample of a batch: its prompt, its answer with the end token, and its clips `(clips,)` by number."""

    prompt: Rendered
    answer: list[int]
    clips: Tensor


@dataclass(frozen=True)
class ExpectedWordErrors:
    """The objective: expected errors of each clip, weighed by its labels, and next-token loss beside them.

    Clips whose samples are all alike add the next-token loss alone. Encoders run once: all passes share their frames.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: ExpectedErrors

    def __call__(self, model: SpeechLLM, batch: Batch) -> tuple[Tensor, Tensor]:
        features, lengths = model.sound(batch)
        batch = replace(batch, features=features, lengths=lengths, waveforms=[])
        cross_entropy, count = next_token(model, batch)
        loss = self.settings.cross_entropy * cross_entropy
        asked = [each for each in _asked(batch) if each.answer]  # a sample without labels has nothing to be compared to
        for each, sampled in zip(asked, self._sample(model, batch, asked), strict=True):
            if len(sampled) < 2:
                continue
            errors = self._errors(model, each, sampled)
            learnt = [_answered(each.prompt, ids, self._end) for ids in sampled]
            likelihoods = log_likelihoods(model, self._collated(batch, learnt, [each.clips] * len(learnt)))
            shares = likelihoods.softmax(0)
            expected = (shares * (errors - errors.mean()).to(shares)).sum()
            loss = loss + len(each.answer) * expected
        return loss, count

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _collated(self, batch: Batch, sequences: list[Rendered], clips: list[Tensor], left: bool = False) -> Batch:
        """Other sequences about the clips of a batch, with its frames, which may carry a gradient."""
        layout: Layout = "left" if left else "right"
        rows = collate([(rendered, []) for rendered in sequences], pad_id(self.tokenizer), layout)
        heard = torch.cat(clips)
        return replace(
            rows.to(batch.ids.device),
            features={role: frames[heard] for role, frames in batch.features.items()},
            lengths={role: counts[heard] for role, counts in batch.lengths.items()},
        )

    def _sample(self, model: SpeechLLM, batch: Batch, asked: list[Asked]) -> list[list[list[int]]]:
        """Different sampled answers of each prompt, without end tokens; the random state is the step's."""
        if not asked:
            return []
        times = self.settings.hypotheses
        repeated = [each for each in asked for _ in range(times)]
        longest = max(len(each.answer) for each in asked) + SPARE
        training = model.training
        model.eval()
        with torch.no_grad():
            prompts = self._collated(batch, [e.prompt for e in repeated], [e.clips for e in repeated], left=True)
        drawn = model.generate(prompts, Decoding(sample=True), self.tokenizer, longest)
        model.train(training)
        groups = [drawn[i * times : (i + 1) * times] for i in range(len(asked))]
        return [[list(ids) for ids in dict.fromkeys(map(tuple, group))] for group in groups]

    def _errors(self, model: SpeechLLM, asked: Asked, sampled: list[list[int]]) -> Tensor:
        """Weighted word errors of each sampled answer, `(answers,)`."""
        listed = " ".join(sorted(model.keywords(self.tokenizer.decode(asked.prompt.ids))))
        context = set(normalise(listed).split())
        reference = normalise(model.read_answer(self.tokenizer, asked.answer)).split()
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


def _asked(batch: Batch) -> list[Asked]:
    """The samples of a batch, cut at their first labels."""
    owners = batch.clip_segments()
    found = []
    for number, (rendered, _) in enumerate(batch.pairs({}, {})):
        prompt = _prompt(rendered)
        found.append(Asked(prompt, rendered.ids[len(prompt) :], (owners == number + 1).nonzero()[:, 0]))
    return found


def _prompt(rendered: Rendered) -> Rendered:
    """The part before the first label."""
    first = next((i for i, label in enumerate(rendered.labels) if label != IGNORED), len(rendered))
    return replace(
        rendered,
        ids=rendered.ids[:first],
        labels=[IGNORED] * first,
        audio_at=[at for at in rendered.audio_at if at < first],
    )


def _answered(prompt: Rendered, ids: list[int], end: int) -> Rendered:
    whole = replace(prompt, ids=list(prompt.ids), labels=list(prompt.labels))
    return whole.tokens([*ids, end], learn=True)
