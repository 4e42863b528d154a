"""What goes into which shard, and under which key: fixed from the list of recordings, before any file is opened."""

from __future__ import annotations

import heapq
import itertools
import posixpath
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from components.digest import digest_bytes
from components.schema import Recording, Reject
from infra.storage import join

KEY_LENGTH = 80  # letters; with the longest suffix (.safetensors) a member name fits into the 100 of a plain tar
PER_SHARD = 256  # recordings
LEAST_CUT = 16  # recordings a shard below which groups are not cut by their ids
CUTS = 4
FEW = 8  # groups a worker: with more, the fullest first leave less than a sixteenth to wait for
SHUFFLES = 256
PIECE = re.compile(r"(.+)--\d{4,}")  # the key of a piece of a recording, see components/shards/samples.py


class Keyed(NamedTuple):
    """A recording and the WebDataset key that its sample gets."""

    key: str
    recording: Recording


def set_duplicates_aside(recordings: Sequence[Recording], data_url: str = "") -> tuple[list[Recording], list[Reject]]:
    """The first recording of each id, in order, and a reject for each later one."""
    seen: set[str] = set()
    kept: list[Recording] = []
    rejects: list[Reject] = []
    for recording in recordings:
        identity = recording.annotation.id
        if identity in seen:
            reason = "duplicate id: an earlier recording has it; give each its own"
            rejects.append(Reject(original=original_name(recording.url, data_url), id=identity, reason=reason))
        else:
            seen.add(identity)
            kept.append(recording)
    return kept, rejects


def assign_keys(recordings: Sequence[Recording]) -> list[str]:
    """A key for each recording: its id in letters, digits, `_` and `-`, unique even where capitals do not count.

    Ids that would share a key get the first 8 digits of their sha256 as well, and so does `a--0001` beside `a`, which
    may be cut into pieces of such keys. ValueError if an id occurs twice.
    """
    ids = [recording.annotation.id for recording in recordings]
    if len(set(ids)) != len(ids):
        repeated = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"id {repeated!r} occurs more than once: pass the recordings through set_duplicates_aside")
    plain = [_plain(identity) for identity in ids]
    sharing = Counter(key.lower() for key in plain)
    taken = {key for key, count in sharing.items() if count == 1}
    keys: list[str] = []
    for identity, key in zip(ids, plain, strict=True):
        of_piece = PIECE.fullmatch(key.lower())
        if sharing[key.lower()] > 1 or (of_piece and sharing[of_piece[1]]):
            key = _distinct(key, identity, taken)
            taken.add(key.lower())
        keys.append(key)
    return keys


def plan_groups(recordings: Sequence[Recording], per_shard: int = PER_SHARD) -> list[list[Keyed]]:
    """Recordings in groups of at most `per_shard`, in the order given; each becomes one shard. ValueError as above.

    Where a group ends is decided by the ids in it, as rsync cuts files: once it is half full, it ends at an id whose
    digest says so. So a data set to which recordings are added, or from which some are removed, keeps all its groups
    but those around the change, and their shards and features are used again. Groups too small for that are just full.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard is {per_shard}: a shard holds at least 1 recording")
    keyed = [Keyed(*pair) for pair in zip(assign_keys(recordings), recordings, strict=True)]
    groups: list[list[Keyed]] = [[]]
    for item in keyed:
        groups[-1].append(item)
        if len(groups[-1]) == per_shard or (2 * len(groups[-1]) >= per_shard >= LEAST_CUT and _ends(item, per_shard)):
            groups.append([])
    return groups if groups[-1] else groups[:-1]


def _ends(item: Keyed, per_shard: int) -> bool:
    """True for one id in `per_shard / CUTS`: five of six half-full groups meet one before they are full."""
    number = int(digest_bytes(item.recording.annotation.id.encode("utf-8", "surrogatepass"))[:8], 16)
    return number * per_shard < CUTS << 32


def in_turn(groups: Sequence[Sequence[Any]], workers: int) -> list[int]:
    """Indexes of groups in the order for so many workers (0: not known) that each take the next one.

    The fullest first, else one is left at the end. Of a few groups that may still keep one worker long after the
    others are done: then shuffles are tried too, and the order is taken by which the last is done soonest.
    """
    sizes = [len(group) for group in groups]
    fullest = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if not workers or len(sizes) > FEW * workers:
        return fullest
    chance = random.Random(0)
    orders = [fullest, *(chance.sample(fullest, len(fullest)) for _ in range(SHUFFLES))]
    return min(orders, key=lambda order: _last_done([sizes[i] for i in order], workers))


def _last_done(sizes: Sequence[int], workers: int) -> int:
    busy = [0] * workers  # until when
    for size in sizes:
        heapq.heapreplace(busy, busy[0] + size)
    return max(busy)


def original_name(url: str, data_url: str) -> str:
    """Name of a file relative to the folder, or to the folder of the manifest, that it was read from."""
    for folder in _folders(data_url):
        if url.startswith(folder):
            return url[len(folder) :]
    return posixpath.basename(url) if "://" in url or url.startswith("/") else posixpath.normpath(url)


@lru_cache(maxsize=4)
def _folders(data_url: str) -> tuple[str, ...]:
    """Where the files of a data set may lie: the folder, or that of the manifest; each with a `/` behind."""
    root = join(data_url, "")
    beside = posixpath.dirname(root) if posixpath.splitext(root)[1] else ""
    return tuple(folder.rstrip("/") + "/" for folder in (root, beside) if folder)


def _plain(identity: str) -> str:
    key = re.sub(r"[^A-Za-z0-9_-]", "_", identity)[:KEY_LENGTH] or "_"
    return "_" + key[1:] if key.startswith("-") else key  # a file that begins with - looks like an option


def _distinct(key: str, identity: str, taken: set[str]) -> str:
    for attempt in itertools.count():
        text = f"{identity}{attempt or ''}".encode("utf-8", "surrogatepass")
        candidate = f"{key[: KEY_LENGTH - 9]}_{digest_bytes(text)[:8]}"
        if candidate.lower() not in taken:
            return candidate
    raise AssertionError("unreachable: the count has no end")
