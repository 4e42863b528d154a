"""The grammar: small, every word taught, held-out sentences that only recombine what training heard."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from components.corpus.grammar import (
    KEPT,
    TEMPLATES,
    all_sentences,
    draw_sentences,
    expand,
    split_sentences,
    vocabulary,
)


def test_sentences_are_plain_and_each_text_occurs_once() -> None:
    texts = [sentence.text for sentence in all_sentences()]
    assert len(texts) == len(set(texts)) == 182
    assert 50 <= len(vocabulary()) <= 60
    assert all(word.isascii() and word.isalpha() and word.islower() for word in vocabulary())
    assert all(2 < len(text.split()) <= 6 for text in texts)


def test_slots_become_labels() -> None:
    first = expand("light_on", "turn on the {room} {lamp}")[0]
    assert first.text == "turn on the kitchen light"
    assert first.labels == {"intent": "light_on", "room": "kitchen", "device": "light"}


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_and_complete(seed: int) -> None:
    splits = split_sentences(seed)
    texts = [sentence.text for split in splits.values() for sentence in split]
    assert sorted(texts) == sorted(sentence.text for sentence in all_sentences())
    assert all({sentence.intent for sentence in split} == set(TEMPLATES) for split in splits.values())
    assert len(splits["test"]) >= 25
    assert len(splits["dev"]) >= len(TEMPLATES)


@pytest.mark.parametrize("seed", range(5))
def test_every_word_is_in_enough_training_sentences(seed: int) -> None:
    taught = Counter(word for sentence in split_sentences(seed)["train"] for word in set(sentence.words))
    assert set(taught) == set(vocabulary())
    held = {word for split in ("dev", "test") for sentence in split_sentences(seed)[split] for word in sentence.words}
    assert min(taught[word] for word in held) >= KEPT


@pytest.mark.parametrize("seed", range(5))
def test_every_word_and_intent_is_frequent_in_training(seed: int) -> None:
    drawn = draw_sentences(split_sentences(seed)["train"], 900, random.Random(seed))
    assert len(drawn) == 900
    words = Counter(word for sentence in drawn for word in sentence.words)
    assert set(words) == set(vocabulary())
    assert min(words.values()) >= 15
    intents = Counter(sentence.intent for sentence in drawn)
    assert max(intents.values()) - min(intents.values()) <= 1
    assert max(Counter(sentence.text for sentence in drawn).values()) <= 20


def test_the_seed_decides_the_split() -> None:
    assert split_sentences(3) == split_sentences(3)
    assert split_sentences(3) != split_sentences(4)
