"""Declared splits stay; the others go by speaker, the same on every machine."""

from __future__ import annotations

from collections import Counter, defaultdict

from components.audio.split import assign_splits
from components.schema import Annotation, Recording, Split


def recording(number: int, speaker: str | None = None, split: Split | None = None) -> Recording:
    noted = Annotation(id=f"clip-{number}", speaker=speaker, split=split)
    return Recording(url=f"/data/{number}.wav", digest="0" * 64, annotation=noted)


def splits(recordings: list[Recording], seed: int = 0) -> list[Split | None]:
    return [item.annotation.split for item in assign_splits(recordings, seed)]


def test_shares_over_many_ids() -> None:
    counts = Counter(splits([recording(number) for number in range(4000)]))
    assert abs(counts["train"] / 4000 - 0.8) < 0.03
    assert abs(counts["dev"] / 4000 - 0.1) < 0.03
    assert counts.total() == 4000


def test_nobody_is_heard_in_two_splits() -> None:
    recordings = [recording(number, speaker=f"s{number % 40}") for number in range(400)]
    heard: dict[str | None, set[Split | None]] = defaultdict(set)
    for item in assign_splits(recordings):
        heard[item.annotation.speaker].add(item.annotation.split)
    assert all(len(names) == 1 for names in heard.values())
    assert len({next(iter(names)) for names in heard.values()}) == 3


def test_declared_splits_stay_and_their_speakers_follow() -> None:
    recordings = [recording(0, "anna", "test"), recording(1, "anna"), recording(2, "ben", "dev"), recording(3, "ben")]
    assert splits(recordings) == ["test", "test", "dev", "dev"]
    everything = [recording(number, split="test") for number in range(5)]
    assert assign_splits(everything) == everything


def test_train_is_never_left_empty() -> None:
    for number in range(60):
        assert splits([recording(number)]) == ["train"]
        assert "train" in splits([recording(number), recording(number + 1)])
        assert "train" in splits([recording(number, split="dev"), recording(number + 1)])


def test_three_speakers_fill_three_splits_and_the_largest_trains() -> None:
    for seed in range(30):
        recordings = [recording(number, speaker=f"s{min(number, 2)}") for number in range(10)]
        names = splits(recordings, seed)
        assert set(names) == {"train", "dev", "test"}
        assert names[2:] == ["train"] * 8


def test_order_and_seed() -> None:
    recordings = [recording(number) for number in range(200)]
    forward = {item.annotation.id: item.annotation.split for item in assign_splits(recordings)}
    backward = {item.annotation.id: item.annotation.split for item in assign_splits(recordings[::-1])}
    assert forward == backward
    assert [item.url for item in assign_splits(recordings)] == [item.url for item in recordings]
    assert splits(recordings, seed=1) != splits(recordings, seed=0)
    grown = [*recordings, *(recording(number) for number in range(200, 400))]
    after = {item.annotation.id: item.annotation.split for item in assign_splits(grown)}
    assert all(after[name] == split for name, split in forward.items())


def test_nothing_in_nothing_out() -> None:
    assert assign_splits([]) == []
