"""Tasks: which samples a record gives, and what is asked."""

from __future__ import annotations

from typing import Any

import pytest

from components.curriculum.tasks import generic_name, question, samples_of, select
from components.curriculum.wordings import WORDINGS

ROW = {
    "key": "k",
    "text": "zero",
    "labels": {"digit": 0, "accent": "US", "slots": {"a": 1}, "flag": True},
    "translation": {"de": "null", "fr": "zéro"},
    "caption": None,
    "conversations": None,
}


def test_labels_and_translations_expand_to_one_sample_each() -> None:
    assert [(s.task, s.reference) for s in samples_of(ROW, "labels")] == [("label:accent", "US"), ("label:digit", "0")]
    assert [(s.task, s.reference) for s in samples_of(ROW, "translation")] == [
        ("translate:de", "null"),
        ("translate:fr", "zéro"),
    ]


def test_a_record_without_the_field_gives_nothing() -> None:
    for task in ("caption", "conversation", "chain", "label:emotion", "translate:it"):
        assert samples_of(ROW, task) == []
    assert samples_of(ROW | {"text": None}, "asr") == []


def test_real_label_zero_is_a_label_and_gender_is_the_speakers() -> None:
    assert samples_of(ROW, "label:digit")[0].reference == "0"
    assert [s.reference for s in samples_of(ROW | {"gender": "female"}, "label:gender")] == ["female"]
    assert samples_of(ROW, "label:gender") == []


def test_an_order_is_its_intent_and_its_slots_in_order() -> None:
    labels = {"intent": "orderDrink", "slots": {"size": "large", "coffeeDrink": " mocha"}}
    assert samples_of(ROW | {"labels": labels}, "intent")[0].reference == "orderDrink; coffeeDrink mocha; size large"
    assert samples_of(ROW, "intent") == []


def test_wordings_are_drawn_from_the_key_and_all_are_used() -> None:
    def request(key: str, phrasings: int) -> str:
        return str(samples_of(ROW | {"key": key}, "label:digit", phrasings)[0].messages[0]["content"][1]["text"])

    assert {request(str(i), 1) for i in range(20)} == {"What is the digit in this audio?"}
    drawn = [request(str(i), 4) for i in range(200)]
    assert drawn == [request(str(i), 4) for i in range(200)]
    assert all(30 <= drawn.count(wording.format(name="digit")) <= 70 for wording in WORDINGS["label"])
    assert all(len(wordings) >= 4 for wordings in WORDINGS.values())


def test_requests_as_tags() -> None:
    """The shapes of QwenLM/Qwen-Audio's eval_audio."""

    def asked(row: dict[str, Any], task: str) -> str:
        return str(samples_of(row, task, 0)[0].messages[0]["content"][1]["text"])

    row = ROW | {"language": "en", "caption": "a dog"}
    transcript = "<|startoftranscript|><|en|>"
    assert asked(row, "asr") == transcript + "<|transcribe|><|en|><|notimestamps|><|wo_itn|>"
    assert asked(row, "translate:de") == transcript + "<|translate|><|de|><|notimestamps|><|itn|>"
    caption = "<|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|><|caption_plain|>"
    assert asked(row, "caption") == caption
    keyword = "<|keyword|><|en|><|notimestamps|><|emotion_recognition|>"
    assert asked(row | {"labels": {"emotion": "joy"}}, "label:emotion") == "<|startofanalysis|><|en|>" + keyword
    digit = "<|question|>What is the digit in this audio?<|answer|>"
    assert asked(row, "label:digit") == "<|startofanalysis|><|en|>" + digit
    russian = "<|question|>Transcribe speech to text.<|answer|>"
    assert asked(row | {"language": "ru"}, "asr") == "<|startofanalysis|><|en|>" + russian


def test_the_answer_is_the_last_turn_and_the_prompt_ends_before_it() -> None:
    (sample,) = samples_of(ROW, "asr")
    assert sample.reference == "zero"
    assert [m["role"] for m in sample.messages] == ["user", "assistant"]
    assert sample.prompt() == question()


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="no task 'asrr'; tasks are: asr"):
        samples_of(ROW, "asrr")


def test_select_keeps_the_order_of_rows() -> None:
    rows = [ROW | {"key": "a"}, ROW | {"key": "b", "text": None}, ROW | {"key": "c"}]
    assert [(s.key, s.task) for s in select(rows, {"asr": 1.0, "label:digit": 1.0})] == [
        ("a", "asr"),
        ("a", "label:digit"),
        ("b", "label:digit"),
        ("c", "asr"),
        ("c", "label:digit"),
    ]
    assert generic_name("label:digit") == "labels"
