"""Train, dev and test for recordings whose manifest does not say."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

from components.schema import Recording, Split, slim

DEV_FROM, TEST_FROM = 0.8, 0.9


def assign_splits(recordings: list[Recording], seed: int = 0, drain: bool = False) -> list[Recording]:
    """The same recordings in the same order, each with a split; a declared split is kept.

    The others go by speaker, or by id where no speaker is known, so that nobody is heard in two splits: about 80 % of
    the speakers to train, 10 % to dev and 10 % to test, by a hash that does not change when more are added. A speaker
    with declared recordings stays where they are, one who makes up more than half of the rest is in train, and train
    is never left empty by this; neither are dev and test, if there are three speakers or more. `drain` empties the list
    that was given, so that a million recordings are not in memory twice.
    """
    counts = Counter(_group(recording) for recording in recordings if recording.annotation.split is None)
    declared = Counter(recording.annotation.split for recording in recordings if recording.annotation.split is not None)
    chosen = _choose(counts, _declared_groups(recordings), declared, seed)
    left = recordings if drain else list(recordings)
    left.reverse()
    made: list[Recording] = []
    while left:
        recording = left.pop()
        made.append(recording if recording.annotation.split else _with_split(recording, chosen[_group(recording)]))
    return made


def _with_split(recording: Recording, split: Split) -> Recording:
    noted = slim(recording.annotation.model_copy(update={"split": split}))
    return slim(recording.model_copy(update={"annotation": noted}))


def _group(recording: Recording) -> str:
    noted = recording.annotation
    return f"speaker {noted.speaker}" if noted.speaker else f"id {noted.id}"


def _declared_groups(recordings: list[Recording]) -> dict[str, Split]:
    """Split of each group whose declared recordings agree."""
    splits: dict[str, set[Split]] = defaultdict(set)
    for recording in recordings:
        if recording.annotation.split is not None:
            splits[_group(recording)].add(recording.annotation.split)
    return {group: next(iter(names)) for group, names in splits.items() if len(names) == 1}


def _choose(counts: Counter[str], bound: dict[str, Split], declared: Counter[Split], seed: int) -> dict[str, Split]:
    half = counts.total() / 2
    places = {group: _place(group, seed) for group in counts if group not in bound}
    chosen: dict[str, Split] = {group: bound[group] for group in counts if group in bound}
    for group, place in places.items():
        chosen[group] = "train" if place < DEV_FROM or counts[group] > half else "dev" if place < TEST_FROM else "test"
    ordered = sorted(places, key=lambda group: (places[group], group))
    have = Counter(chosen.values()) + Counter(dict.fromkeys(declared, 1))
    if ordered and not have["train"]:
        _move(chosen, ordered[0], "train", have)
    if len(ordered) >= 3:
        for split in ("test", "dev"):
            spare = [group for group in ordered if chosen[group] == "train" and counts[group] <= half]
            if not have[split] and have["train"] > 1 and spare:
                _move(chosen, spare[-1], split, have)
    return chosen


def _move(chosen: dict[str, Split], group: str, split: Split, have: Counter[Split]) -> None:
    have[chosen[group]] -= 1
    have[split] += 1
    chosen[group] = split


def _place(group: str, seed: int) -> float:
    """Where a group stands in [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64
