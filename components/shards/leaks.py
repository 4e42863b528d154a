"""What train, dev and test have in common though they should not: audio, and where it is asked, speakers and sentences.

Everything is read from the index; a row without a split belongs to none and leaks nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.evaluation.normalise import normalise
from components.schema import Split
from components.shards.duplicates import Pair, codes, linked

SPLITS: tuple[Split, ...] = get_args(Split)  # from the one that is learnt from to the one that is measured on
Kind = Literal["audio", "near audio", "speaker", "sentence"]
_SAME: dict[Kind, str] = {
    "audio": "the same audio is",
    "near audio": "the same recording is",
    "speaker": "speaker {value!r} is heard",
    "sentence": "the sentence {value!r} is",
}


class Leak(NamedTuple):
    """One value that two splits share."""

    kind: Kind
    splits: tuple[Split, Split]  # in the order of SPLITS
    keys: tuple[str, str]  # the first clip of each split that has it
    value: str  # digest, key of the first of the near duplicates, speaker, or normalised sentence
    clips: tuple[int, int]  # how many of each split have it


class _Labels(NamedTuple):
    """Rows by a value that should stay in one split."""

    kind: Kind
    numbers: np.ndarray  # (rows,) int64, -1 for none
    values: Sequence[str]


def find_leaks(table: Any, speakers: bool, sentences: bool, pairs: Iterable[Pair] = ()) -> list[Leak]:
    """One leak for each value and pair of splits, by kind and then by the first row that has the value.

    Audio is always looked at, near duplicates where `near_duplicates` was asked for their pairs, speakers and sentences
    where the data set promises that they are disjoint. Sentences are compared as error rates are, after
    `components.evaluation.normalise`. Reads `key`, `split`, `audio_digest`, `speaker`, `text` and `language`.
    """
    splits = _split_numbers(table)
    found: list[Leak] = []
    for labels in _labels(table, splits, speakers, sentences, pairs):
        found += _leaks_of(table["key"], splits, labels)
    return found


def summary(leaks: Iterable[Leak]) -> dict[str, dict[str, int]]:
    """Leaks counted by kind and pair of splits: `{"speaker": {"train/test": 3}}`; what has none is left out."""
    counts = Counter((leak.kind, "/".join(leak.splits)) for leak in leaks)
    return {kind: {pair: n for (of, pair), n in sorted(counts.items()) if of == kind} for kind, _ in sorted(counts)}


def rows_to_set_aside(table: Any, speakers: bool, sentences: bool, pairs: Iterable[Pair] = ()) -> dict[int, str]:
    """Rows without which nothing leaks, in order, with their reasons: train gives way to dev and test, dev to test."""
    splits = _split_numbers(table)
    reasons: dict[int, str] = {}
    for labels in _labels(table, splits, speakers, sentences, pairs):
        last = np.full(len(labels.values) + 1, -1)
        np.maximum.at(last, labels.numbers, splits)  # -1, no value, writes to the end, which nobody reads
        rows = np.flatnonzero((labels.numbers >= 0) & (splits >= 0) & (splits < last[labels.numbers]))
        for row, number in zip(rows.tolist(), labels.numbers[rows].tolist(), strict=True):
            same = _SAME[labels.kind].format(value=labels.values[number][:60])
            where = SPLITS[int(last[number])]
            advice = "put all of it into one split" if labels.kind != "speaker" else "give a speaker one split"
            reasons.setdefault(row, f"{same} in {where} as well; {advice}")
    return dict(sorted(reasons.items()))


def _split_numbers(table: Any) -> np.ndarray:
    """(rows,) int64: 0, 1, 2 for train, dev, test, -1 for no split."""
    numbers, values = codes(table["split"])
    places = [SPLITS.index(value) if value in SPLITS else -1 for value in values]  # type: ignore[arg-type]
    return np.take(np.array([*places, -1]), numbers)


def _labels(
    table: Any, splits: np.ndarray, speakers: bool, sentences: bool, pairs: Iterable[Pair]
) -> Iterator[_Labels]:
    digests, values = codes(table["audio_digest"])
    yield _Labels("audio", digests, values)
    yield _near_labels(digests, pairs)
    if speakers:
        yield _Labels("speaker", *codes(table["speaker"]))
    if sentences:
        yield _sentence_labels(table, splits)


def _near_labels(digests: np.ndarray, pairs: Iterable[Pair]) -> _Labels:
    """Groups of near duplicates; the exact duplicates of a clip go with it."""
    groups = linked(pairs)
    of_row, of_digest = np.full(len(digests), -1), np.full(int(digests.max(initial=-1)) + 2, -1)
    for number, group in enumerate(groups):
        rows = np.array(group.rows)
        of_row[rows] = number
        of_digest[digests[rows]] = number
    of_digest[-1] = -1
    return _Labels("near audio", np.where(of_row >= 0, of_row, of_digest[digests]), [group.value for group in groups])


def _sentence_labels(table: Any, splits: np.ndarray) -> _Labels:
    """Rows by their normalised sentence. Only sentences that may be in two splits are normalised: it takes 20 µs each.

    A sentence in one split only, by a rougher comparison that calls more of them equal, cannot leak.
    """
    texts, sentences = codes(table["text"])
    rough = codes(roughly(pa.array(sentences, pa.string())))[0]
    kinds = np.append(rough, -1)[texts]
    known = np.flatnonzero((texts >= 0) & (kinds >= 0) & (splits >= 0))
    found_in = np.zeros((len(SPLITS), int(rough.max(initial=-1)) + 1), bool)
    found_in[splits[known], kinds[known]] = True
    shared = known[found_in.sum(axis=0)[kinds[known]] > 1]
    tongues, languages = codes(table["language"])
    width = len(languages) + 1
    both, inverse = np.unique(texts[shared] * width + tongues[shared] + 1, return_inverse=True)
    numbers: dict[str, int] = {}
    of_both = []
    for text, tongue in zip(*(part.tolist() for part in np.divmod(both, width)), strict=True):
        plain = normalise(sentences[text], languages[tongue - 1] if tongue else None)
        of_both.append(numbers.setdefault(plain, len(numbers)) if plain else -1)
    labels = np.full(len(texts), -1)
    labels[shared] = np.array(of_both, np.int64)[inverse]
    return _Labels("sentence", labels, list(numbers))


def roughly(texts: Any) -> Any:
    """The letters without marks and the digits of texts (an arrow array of strings), in capitals.

    Equal for all that `normalise` makes equal, and for more: `roughly(normalise(text)) == roughly(text)`, whatever the
    language, which is what `_sentence_labels` rests on.
    """
    for _ in range(2):
        texts = pc.utf8_upper(pc.utf8_lower(pc.utf8_normalize(texts, form="NFKD")))
    texts = pc.replace_substring_regex(texts, pattern=r"[^\p{L}\p{N}]|\x{02BC}", replacement="")
    for long, short in (("MISTER", "MR"), ("MISSUS", "MRS"), ("DOCTOR", "DR")):  # English titles are written out
        texts = pc.replace_substring(texts, pattern=long, replacement=short)
    return texts


def _leaks_of(keys: Any, splits: np.ndarray, labels: _Labels) -> list[Leak]:
    rows = np.flatnonzero((labels.numbers >= 0) & (splits >= 0))
    places = labels.numbers[rows] * len(SPLITS) + splits[rows]
    shape = (len(labels.values), len(SPLITS))
    clips = np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)
    first = np.full(shape[0] * shape[1], len(splits))
    first[places[::-1]] = rows[::-1]  # the last written stays: the first of the rows
    first = first.reshape(shape)
    shared = np.flatnonzero((clips > 0).sum(axis=1) > 1)
    shared = shared[np.argsort(first[shared].min(axis=1), kind="stable")]
    leaks = []
    for number in shared.tolist():
        there = np.flatnonzero(clips[number]).tolist()
        for a, b in ((a, b) for a in there for b in there if a < b):
            names = (keys[int(first[number, a])].as_py(), keys[int(first[number, b])].as_py())
            counts = (int(clips[number, a]), int(clips[number, b]))
            leaks.append(Leak(labels.kind, (SPLITS[a], SPLITS[b]), names, labels.values[number], counts))
    return leaks
