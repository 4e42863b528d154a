"""What train, dev and test share is found, named and can be set aside."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from components.evaluation.normalise import normalise
from components.shards.duplicates import Pair
from components.shards.leaks import Leak, find_leaks, roughly, rows_to_set_aside, summary


def index(rows: list[tuple[str | None, str, str | None, str | None]], language: str = "en") -> Any:
    """Columns of an index from (split, digest, speaker, text); the keys are k0, k1, ..."""
    splits, digests, speakers, texts = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = {
        "key": [f"k{number}" for number in range(len(rows))],
        "split": splits,
        "audio_digest": digests,
        "speaker": speakers,
        "text": texts,
        "language": [language] * len(rows),
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


TABLE = index(
    [
        ("train", "a", "anna", "Mr. Hale is here."),
        ("train", "b", "anna", "Something else"),
        ("test", "a", "ben", "nothing"),
        ("dev", "c", "carl", None),
        ("test", "d", "anna", "mister hale, is HERE!"),
        (None, "a", "carl", "Something else"),
        ("dev", "d", None, "..."),
        ("train", "e", "", "..."),
    ]
)
PAIRS = [Pair((1, 3), ("k1", "k3"), 0.93, 4.0, 0.9)]


def test_every_kind_of_leak() -> None:
    audio = [
        Leak("audio", ("train", "test"), ("k0", "k2"), "a", (1, 1)),
        Leak("audio", ("dev", "test"), ("k6", "k4"), "d", (1, 1)),
    ]
    assert find_leaks(TABLE, speakers=False, sentences=False) == audio
    near = Leak("near audio", ("train", "dev"), ("k1", "k3"), "k1", (1, 1))
    speaker = Leak("speaker", ("train", "test"), ("k0", "k4"), "anna", (2, 1))
    sentence = Leak("sentence", ("train", "test"), ("k0", "k4"), "mister hale is here", (1, 1))
    found = find_leaks(TABLE, speakers=True, sentences=True, pairs=PAIRS)
    assert found == [*audio, near, speaker, sentence]
    assert summary(found) == {
        "audio": {"dev/test": 1, "train/test": 1},
        "near audio": {"train/dev": 1},
        "sentence": {"train/test": 1},
        "speaker": {"train/test": 1},
    }
    assert summary([]) == {}


def test_an_exact_copy_of_a_near_duplicate_leaks_too() -> None:
    table = index([("train", "a", None, None), ("train", "b", None, None), ("test", "b", None, None)])
    pairs = [Pair((0, 1), ("k0", "k1"), 0.9, 3.0, 1.0)]
    found = find_leaks(table, speakers=False, sentences=False, pairs=pairs)
    assert [(leak.kind, leak.keys) for leak in found] == [("audio", ("k1", "k2")), ("near audio", ("k0", "k2"))]


def test_sentences_are_compared_within_their_language() -> None:
    rows = [("train", "a", None, "Mr Tan"), ("test", "b", None, "mister tan")]
    assert len(find_leaks(index(rows), False, True)) == 1
    assert find_leaks(index(rows, "de"), False, True) == []


def test_what_is_set_aside_ends_every_leak() -> None:
    reasons = rows_to_set_aside(TABLE, speakers=True, sentences=True, pairs=PAIRS)
    assert list(reasons) == [0, 1, 6]
    assert reasons[0] == "the same audio is in test as well; put all of it into one split"
    assert reasons[1] == "the same recording is in dev as well; put all of it into one split"
    left = TABLE.take([row for row in range(TABLE.num_rows) if row not in reasons])
    assert find_leaks(left, speakers=True, sentences=True) == []
    only = rows_to_set_aside(TABLE, speakers=True, sentences=False)[1]
    assert only == "speaker 'anna' is heard in test as well; give a speaker one split"


def test_nothing_in_nothing_out() -> None:
    assert find_leaks(index([]), True, True) == []
    assert rows_to_set_aside(index([]), True, True) == {}
    assert find_leaks(index([(None, "a", "s", "t"), (None, "a", "s", "t")]), True, True) == []


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12), st.sampled_from([None, "en", "zh"]))
@example("Mis mister Dr mrs", "en")
@example("T\u00a8", "zh")
@example("ΟΔΟΣ ʼn İi ǰ", None)
def test_the_rough_comparison_misses_nothing(text: str, language: str | None) -> None:
    rough = roughly(pa.array([text, normalise(text, language)])).to_pylist()
    assert rough[0] == rough[1]


@pytest.mark.slow
def test_a_million_rows() -> None:
    count = 1_000_000
    drawn = np.random.default_rng(0)
    words = np.array([f"wörd{number}" for number in range(4000)])
    texts = [" ".join(row) for row in words[drawn.integers(0, 4000, (count, 6))]]
    texts[0], texts[1] = "Only HERE, twice", "only here twice!"
    table = pa.table(
        {
            "key": [f"k{number}" for number in range(count)],
            "split": np.where(np.arange(count) % 10, "train", "test"),
            "audio_digest": [f"{number:064x}" for number in [*range(count - 1), 0]],
            "speaker": [f"s{number % 10}" if number % 10 else "s1" for number in range(count)],
            "text": texts,
            "language": ["en"] * count,
        }
    )
    started = time.process_time()
    found = find_leaks(table, speakers=True, sentences=True)
    assert time.process_time() - started < 15
    counts = summary(found)
    assert counts["audio"] == {"train/test": 1} and counts["speaker"] == {"train/test": 1}
    assert [leak.value for leak in found if leak.kind == "sentence"] == ["only here twice"]
