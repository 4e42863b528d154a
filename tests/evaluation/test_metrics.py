"""Counts, rates, groups and the number that a model is judged by."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from components.evaluation.diff import diff
from components.evaluation.metrics import Hypothesis, flat, main_metric, score, score_before


def answer(reference: str, hypothesis: str, **fields: Any) -> Hypothesis:
    known = {"key": "a", "task": "asr", "split": "test", "language": "en", "speaker": "s", "seconds": 1.5}
    return Hypothesis(**(known | fields), reference=reference, hypothesis=hypothesis)


def test_edits_are_summed_over_clips_not_averaged() -> None:
    rates = score([answer("One two three, four!", "one too four five"), answer("hello", "Hello.")]).tasks["asr"].all
    assert (rates.substitutions, rates.deletions, rates.insertions) == (2, 0, 1) or rates.wer == pytest.approx(3 / 5)
    assert rates.words == 5
    assert rates.wer == pytest.approx(3 / 5)
    assert (rates.n, rates.exact, rates.seconds) == (2, 0.5, 3.0)


def test_a_rate_equals_the_textbook_distance() -> None:
    def distance(a: list[str], b: list[str]) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            row, last = [i], row
            for j, y in enumerate(b, 1):
                row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        return row[-1]

    chance = random.Random(0)
    pairs = [tuple(" ".join(chance.choices("abcd", k=chance.randrange(9))) for _ in range(2)) for _ in range(50)]
    rates = score([answer(*pair) for pair in pairs]).tasks["asr"].all
    words = sum(len(reference.split()) for reference, _ in pairs)
    assert rates.wer == pytest.approx(sum(distance(a.split(), b.split()) for a, b in pairs) / words)
    assert rates.cer == pytest.approx(sum(distance(list(a), list(b)) for a, b in pairs) / sum(len(a) for a, _ in pairs))
    assert rates.interval is not None
    assert rates.interval[0] < rates.wer < rates.interval[1]


def test_groups_add_up_and_name_what_is_not_stated() -> None:
    rows = [
        answer("a b", "a", speaker="x"),
        answer("c d", "c d", speaker=None, language=None),
        answer("e f", "g h", split="dev", speaker="y"),
    ]
    result = score(rows).tasks["asr"]
    assert {key: rates.wer for key, rates in result.by_split.items()} == {"test": 0.25, "dev": 1.0}
    assert {key: rates.wer for key, rates in result.by_speaker.items()} == {"not stated": 0.0, "x": 0.5}
    assert sum(rates.n for rates in result.by_language.values()) == 2
    assert result.main_split == "test"
    assert result.all.wer == 0.5


def test_empty_references_count_as_insertions_and_never_divide_by_zero() -> None:
    rates = score([answer("", "uh huh")]).tasks["asr"].all
    assert rates.wer is None
    assert rates.cer is None
    assert rates.exact == 0.0
    assert score([answer("…", "")]).tasks["asr"].all.exact == 1.0
    assert score([answer("", "uh"), answer("a b", "a b")]).tasks["asr"].all.wer == 0.5
    with pytest.raises(ValueError, match="undefined"):
        main_metric(score([answer("", "uh")]))
    with pytest.raises(ValueError, match="nothing to score"):
        score([])


def test_unspaced_languages_are_judged_by_characters() -> None:
    scores = score([answer("一个老虎钳。", "一个 老虎锤", task="translate:zh", language="zh")])
    result = scores.tasks["translate:zh"]
    assert result.all.wer is None
    assert result.all.cer == 0.2
    assert result.metric == "cer"
    assert main_metric(scores) == ("translate:zh/test/cer", 0.2, "lower")


def test_labels_are_judged_by_accuracy_beside_the_constant_answer() -> None:
    pairs = [("anger", "Anger."), ("anger", "fear"), ("anger", "anger"), ("fear", "anger")]
    scores = score([answer(*pair, task="label:emotion") for pair in pairs])
    result = scores.tasks["label:emotion"]
    assert main_metric(scores) == ("label:emotion/test/accuracy", 0.5, "higher")
    assert (result.all.majority, result.all.majority_answer) == (0.75, "anger")
    assert result.confusion == {"anger": {"anger": 2, "fear": 1}, "fear": {"anger": 1}}


def test_asr_on_the_test_split_is_the_main_number_whatever_the_order() -> None:
    rows = [answer("x", "x", task="label:a"), answer("a b", "a c", split="dev"), answer("a b", "a b")]
    assert main_metric(score(rows))[:2] == ("asr/test/wer", 0.0)
    assert main_metric(score(rows), split="dev")[:2] == ("asr/dev/wer", 0.5)
    with pytest.raises(ValueError, match=r"\['dev', 'test'\]"):
        main_metric(score(rows), split="train")


def test_scores_are_json_and_the_same_twice() -> None:
    rows = [answer("a b c", "a c", key=str(i)) for i in range(5)] + [answer("", "x")]
    scores = score(rows)
    assert json.loads(scores.model_dump_json())["tasks"]["asr"]["by_split"]["test"]["n"] == 6
    assert score(rows) == scores == type(scores).model_validate_json(scores.model_dump_json())
    assert flat(scores)["asr/test/wer"] == scores.tasks["asr"].all.wer


def test_answers_of_before_are_scored_alike() -> None:
    rows = [answer("a b", "a b", before="b"), answer("c", "c")]
    before = score_before(rows)
    assert before is not None
    assert before.tasks["asr"].all.n == 1
    assert before.tasks["asr"].all.wer == 0.5
    assert score_before(rows[1:]) is None


def test_differences_are_marked_on_the_texts_as_written() -> None:
    left, right = diff("Hello, well-known world — yes", "hello well known word yes sir")
    assert [piece.text for piece in left] == ["Hello,", "well-known", "world", "—", "yes"]
    assert [piece.mark for piece in left] == ["equal", "equal", "substitute", "equal", "equal"]
    assert [piece.mark for piece in right] == ["equal", "equal", "equal", "substitute", "equal", "insert"]
    left, _ = diff("你好世界", "你 好世", "zh")
    assert [piece.mark for piece in left] == ["equal", "equal", "equal", "delete"]
