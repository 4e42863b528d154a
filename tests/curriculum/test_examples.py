"""In-context examples: which rows are taken for a row, and what becomes of them in a conversation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from components.curriculum.examples import TRIES, Examples, collection
from components.curriculum.tasks import samples_of

Row = dict[str, Any]


def row(key: str, text: str | None = "stop", folder: str = "books", **entries: Any) -> Row:
    fields: Row = {"labels": {}, "translation": {}, "caption": None, "conversations": None}
    return {"key": key, "text": text, "original": f"{folder}/{key}.wav"} | fields | entries


def rows(count: int, folder: str = "books") -> list[Row]:
    return [row(f"{folder}{i}", folder=folder) for i in range(count)]


def keys(found: list[Row]) -> list[str]:
    return [each["key"] for each in found]


# ---- drawn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 6, 12, 35])
def test_every_other_row_can_be_had_once_and_the_row_itself_never(size: int) -> None:
    """Also where the number of rows has small factors."""
    pool = rows(size)
    for own in pool:
        found = keys(Examples(pool, size).of(own, "asr"))
        assert sorted([*found, own["key"]]) == sorted(keys(pool))


def test_the_same_examples_in_every_process_and_for_another_count() -> None:
    pool = rows(20)
    four = [keys(Examples(pool, 4).of(own, "asr")) for own in pool]
    assert four == [keys(Examples(list(pool), 4).of(dict(own), "asr")) for own in pool]
    assert [found[:2] for found in four] == [keys(Examples(pool, 2).of(own, "asr")) for own in pool]
    assert keys(Examples(pool, 4).of(pool[0], "asr")) == ["books2", "books3", "books4", "books5"]
    assert len({tuple(found) for found in four}) > 10  # which ones depends on the row


def test_drawn_examples_are_of_the_same_data_set() -> None:
    pool = [*rows(7), *rows(5, "calls"), row("bare", folder="") | {"original": "bare.wav"}]
    for own in pool[:12]:
        found = Examples(pool, 3).of(own, "asr")
        assert len(found) == 3
        assert {collection(each) for each in found} == {collection(own)}
    assert collection(pool[-1]) == ""
    assert Examples(pool, 3).of(pool[-1], "asr") == []  # alone in its set


def test_a_row_of_a_set_that_the_pool_lacks_has_any() -> None:
    assert len(Examples(rows(7), 3).of(row("new", folder="field"), "asr")) == 3


def test_only_rows_that_the_task_can_be_asked_of() -> None:
    pool = [row(f"c{i}", labels={"room": "hall"} if i % 3 == 0 else {}) for i in range(12)]
    found = keys(Examples(pool, 12).of(pool[3], "label:room"))
    assert sorted(found) == ["c0", "c6", "c9"]
    silent = [row("a", text=None), row("b", text="")]
    assert Examples([*silent, row("c")], 3).of(row("d"), "asr") == [row("c")]


def test_a_search_for_what_is_rare_ends() -> None:
    pool = [*[row(f"c{i}", text=None) for i in range(5000)], row("last")]
    assert len(Examples(pool, 1).of(row("own"), "asr")) <= 1
    assert len(Examples(pool, 1)._drawn(row("own"))) == TRIES


def test_no_examples_from_nothing_and_for_none() -> None:
    assert Examples().of(row("a"), "asr") == []
    assert Examples([], 2).of(row("a"), "asr") == []
    assert Examples(rows(4), 0).of(row("a"), "asr") == []


def test_where_prompts_hold_one_clip_others_lend_their_words_only() -> None:
    examples = Examples(rows(4), 2, turns=False)
    assert examples.of(row("books0"), "asr") == []
    assert len(examples.of(row("books0"), "biased_asr")) == 2


# ---- nearest ----------------------------------------------------------------------------------------------------


def test_nearest_are_those_of_the_highest_cosine() -> None:
    pool = rows(9)
    generator = torch.Generator().manual_seed(0)
    features = {each["key"]: torch.randn(4 + i, 5, generator=generator) for i, each in enumerate(pool)}
    features["books3"] = features["books0"][:2].mean(0, keepdim=True) * 7  # length does not count
    own = pool[0]

    def cosine(key: str) -> float:
        one, other = features[own["key"]].mean(0), features[key].mean(0)
        return float(one @ other / one.norm() / other.norm())

    expected = sorted((key for key in features if key != own["key"]), key=cosine, reverse=True)
    assert keys(Examples(pool, 4, features.__getitem__).of(own, "asr")) == expected[:4]
    pool[int(expected[0][-1])]["text"] = None
    assert keys(Examples(pool, 4, features.__getitem__).of(own, "asr")) == expected[1:5]


def test_a_nearest_row_may_come_from_outside_of_the_pool() -> None:
    """As in evaluation, where examples come from the train split."""
    features: dict[str, Tensor] = {"books0": torch.tensor([[1.0, 0.0]]), "books1": torch.tensor([[0.0, 1.0]])}
    features["test"] = torch.tensor([[0.2, 0.9], [0.0, 1.1]])
    assert keys(Examples(rows(2), 1, features.__getitem__).of(row("test"), "asr")) == ["books1"]


# ---- in a conversation ------------------------------------------------------------------------------------------


def test_examples_become_turns_in_order_with_the_wording_of_the_row() -> None:
    others = [row("a", "left"), row("b", "right")]
    (sample,) = samples_of(row("own", "stop"), "asr", phrasings=4, others=others)
    assert sample.keys == ("a", "b", "own")
    assert sample.key == "own"
    assert sample.reference == "stop"
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 3
    answers = [message["content"][0]["text"] for message in sample.messages[1::2]]
    assert answers == ["left", "right", "stop"]
    requests = [message["content"] for message in sample.messages[::2]]
    assert all([part["type"] for part in request] == ["audio", "text"] for request in requests)
    assert len({request[1]["text"] for request in requests}) == 1
    assert requests[0] == samples_of(row("own", "stop"), "asr", phrasings=4)[0].messages[0]["content"]
    assert sample.prompt() == list(sample.messages[:-1])


def test_examples_of_a_label_answer_for_the_same_label() -> None:
    own = row("own", labels={"room": "hall", "digit": 3})
    other = row("other", labels={"room": "kitchen", "digit": 5})
    (sample,) = samples_of(own, "label:room", others=[other])
    assert [message["content"][0]["text"] for message in sample.messages[1::2]] == ["kitchen", "hall"]
    assert sample.messages[0] == sample.messages[2]


def test_a_biasing_list_mixes_words_of_its_own_with_those_of_others() -> None:
    own, other = row("own", "turn on the kitchen light"), row("other", "a thunderstorm is coming")
    (alone,) = samples_of(own, "biased_asr")
    (mixed,) = samples_of(own, "biased_asr", others=[other])
    assert alone.messages[0]["content"][1]["text"].count("kitchen, light, turn") == 1
    listed = "coming, is, kitchen, light, thunderstorm, turn"  # the three longest of each, in alphabetical order
    assert mixed.messages[0]["content"][1]["text"] == f"These words may occur: {listed}. Transcribe speech to text."
    assert mixed.keys == ("own",)  # others lend words, not clips
    assert mixed.reference == "turn on the kitchen light"
