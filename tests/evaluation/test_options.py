"""Labels as options: the likeliest one, by the same loss that training computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components.evaluation.metrics import Hypothesis, flat, score, score_before
from components.evaluation.options import MOST, choose, options_of
from models.batch import collate
from tests.contract.conftest import ROWS, Subject, subject  # noqa: F401  # a fixture is used by its name

LABELS = ["garden", "hall", "kitchen"]


def test_options_are_the_labels_of_the_rows() -> None:
    assert options_of(ROWS, "label:room") == LABELS
    assert options_of(ROWS, "asr") == []
    assert options_of(ROWS[:1], "label:room") == []  # one label is no choice
    many = [row | {"labels": {"room": str(i)}} for i in range(MOST + 1) for row in ROWS[:1]]
    assert options_of(many, "label:room") == []


@pytest.mark.parametrize("subject", ["funasr_llm", "salmonn", "speechgpt"], indirect=True)
def test_the_choice_is_the_label_with_the_least_loss(subject: Subject) -> None:  # noqa: F811
    with torch.no_grad():  # a random model with tied embeddings likes one label for every clip
        for parameter in subject.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    samples = subject.samples({"label:room": 1.0})
    prompts, clips = [s.prompt() for s in samples], [[subject.audios[s.key]] for s in samples]
    chosen = choose(subject.model, subject.tokenizer, prompts, clips, LABELS)
    for prompt, heard, found in zip(prompts, clips, chosen, strict=True):
        losses = {}
        for label in LABELS:
            answered: list[dict[str, Any]] = [*prompt, {"role": "assistant", "content": label}]
            rendered = subject.model.render(subject.tokenizer, answered, heard)
            batch = collate([(rendered, heard)], subject.tokenizer.pad_token_id)
            losses[label] = float(subject.model(batch)[0].detach())
        assert found == min(losses, key=lambda label: losses[label])


def test_right_choices_are_counted_beside_free_answers() -> None:
    rows = [
        Hypothesis(key=str(i), task="label:room", split="test", reference=r, hypothesis=h, before="x", choice=c)
        for i, (r, h, c) in enumerate([("hall", "Hall.", "hall"), ("hall", "a hall", "hall"), ("kitchen", "", "hall")])
    ]
    rates = score(rows).tasks["label:room"].all
    assert (rates.exact, rates.choice) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert flat(score(rows))["label:room/test/choice"] == pytest.approx(2 / 3)
    before = score_before(rows)
    assert before is not None and before.tasks["label:room"].all.choice is None
