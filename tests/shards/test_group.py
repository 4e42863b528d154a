"""components/shards/group.py: every recording once, under a key that is unique and safe."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.digest import digest_bytes
from components.schema import Annotation, Recording
from components.shards.group import (
    KEY_LENGTH,
    assign_keys,
    in_turn,
    original_name,
    plan_groups,
    set_duplicates_aside,
)

SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def recordings(ids: list[str]) -> list[Recording]:
    return [
        Recording(url=f"/data/{number}.wav", digest="0", annotation=Annotation(id=identity))
        for number, identity in enumerate(ids)
    ]


def short(text: str) -> str:
    return digest_bytes(text.encode())[:8]


# Few different letters, so that ids meet after cleaning and by capitals.
NAMES = st.text("aAb_-./ é0", max_size=6) | st.text(st.characters(exclude_categories=[]), max_size=120)
IDS = st.lists(NAMES, max_size=30)


@given(IDS, st.integers(1, 7))
def test_each_recording_is_once_in_the_plan_under_a_safe_key(ids: list[str], per_shard: int) -> None:
    given_list = recordings(ids)
    kept, rejects = set_duplicates_aside(given_list, "/data")
    assert len(kept) + len(rejects) == len(ids)
    assert [item.annotation.id for item in kept] == list(dict.fromkeys(ids))
    groups = plan_groups(kept, per_shard)
    keyed = [item for group in groups for item in group]
    assert [item.recording for item in keyed] == kept
    assert all(len(group) == per_shard for group in groups[:-1])
    assert all(0 < len(group) <= per_shard for group in groups)
    keys = [item.key for item in keyed]
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(SAFE.fullmatch(key) and len(key) <= KEY_LENGTH for key in keys)
    assert plan_groups(kept, per_shard) == groups


@settings(max_examples=50)
@given(IDS)
def test_a_key_that_nobody_shares_does_not_depend_on_the_others(ids: list[str]) -> None:
    kept, _ = set_duplicates_aside(recordings(ids))
    keys, backwards = assign_keys(kept), assign_keys(kept[::-1])[::-1]
    for recording, key, other in zip(kept, keys, backwards, strict=True):
        plain = assign_keys([recording])[0]
        assert (key == plain) == (other == plain)


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (["1688-142285-0000", "a/b.c d"], ["1688-142285-0000", "a_b_c_d"]),
        (["a/b", "a.b", "c"], [f"a_b_{short('a/b')}", f"a_b_{short('a.b')}", "c"]),
        (["Yes", "yes"], [f"Yes_{short('Yes')}", f"yes_{short('yes')}"]),
        (["", "-rf", "ünï"], ["_", "_rf", "_n_"]),
        (["x" * 90, "x" * 91], ["x" * 71 + "_" + short("x" * 90), "x" * 71 + "_" + short("x" * 91)]),
        (["a/b", "a.b", f"a_b_{short('a/b')}"], [f"a_b_{short('a/b1')}", f"a_b_{short('a.b')}", f"a_b_{short('a/b')}"]),
    ],
)
def test_keys(ids: list[str], keys: list[str]) -> None:
    assert assign_keys(recordings(ids)) == keys


def test_a_second_recording_with_the_same_id_is_set_aside() -> None:
    kept, rejects = set_duplicates_aside(recordings(["a", "b", "a"]), "/data")
    assert [item.url for item in kept] == ["/data/0.wav", "/data/1.wav"]
    assert [(reject.original, reject.id) for reject in rejects] == [("2.wav", "a")]
    assert rejects[0].reason.startswith("duplicate id")
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        plan_groups(recordings(["a", "b", "a"]))


def test_a_shard_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="per_shard is 0"):
        plan_groups(recordings(["a"]), 0)


@pytest.mark.parametrize(
    ("url", "data", "name"),
    [
        ("/data/a/b.wav", "/data", "a/b.wav"),
        ("/data/a/b.wav", "/data/", "a/b.wav"),
        ("/data/a/b.wav", "/data/manifest.jsonl", "a/b.wav"),
        ("s3://bucket/d/b.wav", "s3://bucket/d", "b.wav"),
        ("./a/b.wav", ".", "a/b.wav"),
        ("data/b.wav", "data", "b.wav"),
        ("./b.wav", "manifest.jsonl", "b.wav"),
        ("/elsewhere/b.wav", "/data", "b.wav"),
        ("s3://key:secret@b/x/y.wav", "/data", "y.wav"),
    ],
)
def test_original_names_are_relative_to_the_data(url: str, data: str, name: str) -> None:
    assert original_name(url, data) == name


def done_at(groups: list[range], order: list[int], workers: int) -> int:
    """When the last worker is done, if each takes the next group as soon as it is free."""
    busy = [0] * workers
    for i in order:
        first = busy.index(min(busy))
        busy[first] += len(groups[i])
    return max(busy)


@given(st.lists(st.integers(1, 256), max_size=40), st.integers(1, 5))
def test_every_group_has_its_turn_and_the_last_is_done_no_later(sizes: list[int], workers: int) -> None:
    groups = [range(size) for size in sizes]
    order, fullest = in_turn(groups, workers), in_turn(groups, 0)
    assert sorted(order) == list(range(len(sizes))) == sorted(fullest)
    assert [sizes[i] for i in fullest] == sorted(sizes, reverse=True)
    assert done_at(groups, order, workers) <= done_at(groups, fullest, workers)
    assert in_turn(groups, workers) == order


def test_few_groups_are_shared_out_evenly() -> None:
    groups = [range(size) for size in (135, 239, 206, 234, 221, 164, 250, 51)]
    assert done_at(groups, in_turn(groups, 0), 2) == 772
    assert done_at(groups, in_turn(groups, 2), 2) <= 755
