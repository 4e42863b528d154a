"""The sentences of the spoken corpus: a small grammar of home commands, and which of them are held out.

About 60 words in 14 intents. A template's slots become labels, so that the clips serve intent and slot tasks as
well as recognition. Everything is drawn from the seed with `random.Random`, whose sequence is stable.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "dev", "test"]

ROOMS = ("kitchen", "bedroom", "bathroom", "garage", "garden")
SOUNDS = ("music", "jazz", "piano", "radio", "news")
NUMBERS = ("two", "five", "seven", "nine", "ten")
DAYS = ("today", "tomorrow", "tonight")
PEOPLE = ("mother", "brother", "sister")

SLOTS: dict[str, tuple[str, ...]] = {
    "room": ROOMS,
    "lamp": ("light", "lamp"),
    "opening": ("door", "window"),
    "sound": SOUNDS,
    "genre": ("music", "jazz", "piano"),
    "station": ("radio", "news"),
    "number": NUMBERS,
    "unit": ("minutes", "hours"),
    "day": DAYS,
    "weather": ("cold", "warm"),
    "animal": ("dog", "cat"),
    "person": PEOPLE,
}
LABELS = {"lamp": "device", "opening": "device", "genre": "sound", "station": "sound"}  # slot: label, if they differ

TEMPLATES: dict[str, tuple[str, ...]] = {
    "light_on": ("turn on the {room} {lamp}", "turn the {room} {lamp} on"),
    "light_off": ("turn off the {room} {lamp}", "turn the {room} {lamp} off"),
    "open": ("open the {room} {opening}",),
    "close": ("close the {room} {opening}",),
    "play": ("play some {genre}", "play more {genre}", "play the {station}"),
    "stop": ("stop the {sound}", "please stop the {sound}"),
    "volume_up": ("turn up the {sound}", "turn the {sound} up"),
    "volume_down": ("turn down the {sound}", "turn the {sound} down"),
    "timer": ("set a timer for {number} {unit}",),
    "alarm": ("set the alarm for {number}", "wake me at {number} {day}"),
    "weather": ("what is the weather {day}", "is it {weather} {day}", "is it {weather} in the {room}"),
    "where": ("the {animal} is in the {room}",),
    "ask_where": ("is the {animal} in the {room}",),
    "call": ("call my {person}", "call my {person} {day}", "please call my {person}"),
}

# Of each intent's sentences; what is left must still teach every word (`split_sentences`).
TEST_SHARE = 0.15
DEV_SHARE = 0.08
KEPT = 3  # training sentences, at least, that hold each word


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower case without punctuation, and what it asks for."""

    text: str
    intent: str
    template: str
    slots: dict[str, str] = field(hash=False)

    @property
    def labels(self) -> dict[str, str]:
        return {"intent": self.intent, **{LABELS.get(name, name): value for name, value in self.slots.items()}}

    @property
    def words(self) -> list[str]:
        return self.text.split()


def all_sentences() -> list[Sentence]:
    """Every sentence of the grammar, each text once, in the order of TEMPLATES."""
    return [
        sentence for intent, templates in TEMPLATES.items() for text in templates for sentence in expand(intent, text)
    ]


def expand(intent: str, template: str) -> list[Sentence]:
    """The template with every value of every slot; the last slot runs fastest."""
    names = re.findall(r"{(\w+)}", template)
    filled = [dict(zip(names, values, strict=True)) for values in itertools.product(*(SLOTS[name] for name in names))]
    return [Sentence(template.format(**slots), intent, template, slots) for slots in filled]


def vocabulary() -> list[str]:
    return sorted({word for sentence in all_sentences() for word in sentence.words})


def split_sentences(seed: int) -> dict[Split, list[Sentence]]:
    """The sentences by split: disjoint, every intent in each, every held-out word in KEPT training sentences."""
    rng = random.Random(seed)
    sentences = all_sentences()
    taught = Counter(word for sentence in sentences for word in set(sentence.words))
    splits: dict[Split, list[Sentence]] = {"train": [], "dev": [], "test": []}
    for intent in TEMPLATES:
        candidates = _shuffled([sentence for sentence in sentences if sentence.intent == intent], rng)
        room = {"test": max(1, round(TEST_SHARE * len(candidates))), "dev": max(1, round(DEV_SHARE * len(candidates)))}
        for sentence in candidates:
            spare = all(taught[word] > KEPT for word in sentence.words)
            split: Split = "train" if not spare else "test" if room["test"] else "dev" if room["dev"] else "train"
            splits[split].append(sentence)
            if split != "train":
                room[split] -= 1
                taught.subtract(set(sentence.words))
    return splits


def draw_sentences(sentences: list[Sentence], count: int, rng: random.Random) -> list[Sentence]:
    """`count` sentences: intents in turn, and of an intent a sentence drawn seldom, with a word heard seldom.

    So a word that few sentences hold is nearly as frequent as the others (in 900: 17 times at least).
    """
    intents = sorted({sentence.intent for sentence in sentences})
    heard: Counter[str] = Counter()
    times: Counter[str] = Counter()

    def rarity(sentence: Sentence) -> int:
        return 3 * times[sentence.text] + min(heard[word] for word in sentence.words)

    drawn: list[Sentence] = []
    while len(drawn) < count:
        for intent in _shuffled(intents, rng)[: count - len(drawn)]:
            sentence = min(_shuffled([s for s in sentences if s.intent == intent], rng), key=rarity)
            heard.update(sentence.words)
            times[sentence.text] += 1
            drawn.append(sentence)
    return drawn


def _shuffled(items: list[T], rng: random.Random) -> list[T]:
    return rng.sample(items, len(items))
