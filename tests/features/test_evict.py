"""Which caches a lake has, which of them go, and that a removal which was killed goes on."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from components.features import evict
from components.features.evict import MARK, Cache, Policy, choose, list_caches, remove
from components.shards.index import find_manifest
from infra import storage
from tests.registry.lake_helpers import add_audio, add_cache, copied, index_table

DAY, HOUR = 86_400.0, 3600.0
SIZE = 1000 + 2 + 5  # bytes of a cache's tar, part and index


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches a and b of audio that is there, c and d of audio that is gone."""
    folder = tmp_path_factory.mktemp("made")
    audio = add_audio(str(folder), "talk", "v1", index_table(4))
    gone = audio.model_copy(update={"version": "v0", "digest": "0" * 64})
    for name in "abcd":
        add_cache(str(folder), gone if name in "cd" else audio, name * 16)
    return folder


@pytest.fixture(params=["local", "memory"])
def lake(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> str:
    """A copy of it to work on."""
    return copied(made, request.param, tmp_path)


def aged(lake: str, place: str, seconds: float) -> None:
    """Make every file of a cache that old."""
    root, then = storage.join(lake, "features", place), time.time() - seconds
    for name in storage.find(root):
        url = storage.join(root, name)
        if storage.is_local(url):
            os.utime(url, (then, then))
        else:
            files, path = fsspec.core.url_to_fs(url)
            files.store[path].created = datetime.fromtimestamp(then, UTC)


def four(lake: str) -> list[Cache]:
    """a: a run uses it, 40 days; b: its audio is there, 20 days; c: nothing leads to it, 10 days; d: the same, new."""
    for name, days in zip("abcd", (40, 20, 10, 0), strict=True):
        aged(lake, f"{name * 16}/talk/{'v0' if name in 'cd' else 'v1'}", days * DAY)
    (a, *_) = list_caches(lake, {}, {})
    digest = find_manifest(storage.join(lake, "audio/talk/v1"))
    return list_caches(lake, {"talk/v1": digest.digest if digest else ""}, {a.digest: ["salmonn/talk-r1"]})


def names(caches: list[Cache]) -> str:
    return "".join(one.place[0] for one in caches)


def test_a_list_says_what_each_cache_is_and_who_uses_it(lake: str) -> None:
    caches = four(lake)
    assert names(caches) == "abcd"
    assert [one.audio for one in caches] == [True, True, False, False]
    assert [one.used_by for one in caches] == [("salmonn/talk-r1",), (), (), ()]
    assert [one.reachable for one in caches] == [True, True, False, False]
    a = caches[0]
    manifest = storage.size(storage.join(a.url, "manifest.json"))
    assert (a.encoder, a.dataset, a.version, a.frames, a.width, a.clips) == ("whisper", "talk", "v1", 200, 8, 4)
    assert a.bytes == SIZE + manifest
    assert [round((time.time() - one.modified) / DAY) for one in caches] == [40, 20, 10, 0]
    assert all(one.finished and not one.removing for one in caches)


def test_each_limit_narrows_the_choice(lake: str) -> None:
    caches = four(lake)
    each = caches[0].bytes
    for policy, going, kept in (
        (Policy(unreachable=True), "c", "d"),
        (Policy(unreachable=True, older_than=15 * DAY), "", ""),
        (Policy(older_than=15 * DAY), "b", "a"),
        (Policy(older_than=15 * DAY, even_reachable=True), "ba", ""),
        (Policy(unreachable=True, even_reachable=True), "cd", ""),
        (Policy(larger_than=4 * each), "", ""),
        (Policy(larger_than=4 * each - 1), "c", ""),
        (Policy(larger_than=2 * each), "cb", "d"),
        (Policy(larger_than=0), "cb", "da"),
        (Policy(larger_than=0, even_reachable=True), "cdba", ""),
    ):
        chosen = choose(caches, policy)
        assert (names(chosen.going), "".join(one.place[0] for one, _ in chosen.kept)) == (going, kept), policy
        assert chosen.left == each * (4 - len(going))
    with pytest.raises(ValueError, match="--older-than 30d"):
        choose(caches, Policy())


def test_what_a_record_names_by_its_place_is_kept_although_its_manifest_is_damaged(lake: str) -> None:
    caches = four(lake)
    place = caches[0].place
    storage.write_bytes(storage.join(caches[0].url, "manifest.json"), b"{")
    aged(lake, place, 40 * DAY)
    (a, *_) = list_caches(lake, {}, {place: ["salmonn/1-a"]})
    assert (a.finished, a.used_by, a.audio) == (False, ("salmonn/1-a",), False)
    assert names(choose([a], Policy(unreachable=True)).going) == ""
    (a, *_) = list_caches(lake, {"talk/v1": ""}, {})
    assert (a.audio, a.used_by) == (True, ())


def test_a_removed_cache_is_gone_and_nothing_else(lake: str) -> None:
    caches = four(lake)
    before = set(storage.find(lake))
    remove(caches[2])
    gone = before - set(storage.find(lake))
    assert {name.rpartition("cccc/talk/v0/")[2] for name in gone} == {
        "manifest.json", "features.parquet", "parts/shard-000000.json", "shard-000000.tar",
    }  # fmt: skip
    assert names(list_caches(lake, {}, {})) == "abd"


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_killed_while_it_removes_the_next_call_goes_on(lake: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = four(lake)
    removed = []

    def kill(url: str) -> None:
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(url)
        storage.remove_tree(url)

    with monkeypatch.context() as patched:
        patched.setattr(evict, "remove_tree", kill)
        patched.setattr(evict, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            remove(caches[2])
    assert [url.rpartition("/")[2] for url in removed[:1]] == ["manifest.json"][:after]
    again = list_caches(lake, {}, {})
    half = again[2]
    assert (half.finished, half.removing) == (after == 0, after > 0)
    # Whatever the limits say, what is half removed goes first; a whole cache is judged as before.
    chosen = choose(again, Policy(larger_than=10**9))
    assert names(chosen.going) == ("c" if after else "")
    for one in chosen.going or [half]:
        remove(one)
    assert names(list_caches(lake, {}, {})) == "abd"


def test_a_cache_that_is_made_anew_is_no_longer_being_removed(lake: str) -> None:
    cache = four(lake)[2]
    storage.write_json(storage.join(cache.url, MARK), {})
    storage.remove_tree(storage.join(cache.url, "manifest.json"))
    assert list_caches(lake, {}, {})[2].removing
    storage.write_bytes(storage.join(cache.url, "shard-000001.tar"), b"new")
    half = list_caches(lake, {}, {})[2]
    assert (half.removing, half.finished) == (False, False)
    chosen = choose([half], Policy(unreachable=True))
    assert (chosen.going, chosen.kept[0][1]) == ([], "changed within the last hour")
    aged(lake, cache.place, 2 * HOUR)
    assert names(choose(list_caches(lake, {}, {})[2:3], Policy(unreachable=True)).going) == "c"


def test_an_empty_lake_has_no_caches(lake: str) -> None:
    assert list_caches(storage.join(lake, "nothing"), {}, {}) == []
    assert choose([], Policy(unreachable=True)) == ([], [], 0)


@pytest.mark.slow
def test_on_a_store(bucket: str) -> None:
    lake = storage.join(bucket, "lake")
    audio = add_audio(lake, "talk", "v1", index_table(4))
    made = [add_cache(lake, audio, name * 16) for name in "ab"]
    caches = list_caches(lake, {}, {made[0].digest: ["salmonn/r"]})
    assert names(caches) == "ab"
    assert all(abs(time.time() - one.modified) < 60 and one.bytes > SIZE for one in caches)
    assert choose(caches, Policy(unreachable=True)).going == []  # just made
    later = choose(caches, Policy(unreachable=True), now=time.time() + 2 * HOUR)
    assert (names(later.going), later.kept[0][1]) == ("b", "used by 1 stages and runs")
    remove(caches[1])
    assert names(list_caches(lake, {}, {})) == "a"
