"""Clips that are in a data set more than once: the same samples, and the same recording after another codec or cut.

Equal digests are grouped. For the rest, clips that share a hash of their fingerprints are candidates, and each is
compared in full (components/audio/fingerprint.py). Both read the index and open no tar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.audio.fingerprint import HOP_SECONDS, LEAST_OVERLAP, alike, match
from components.shards.arrays import numbers, rows_at

PER_CLIP = 64  # hashes of a clip that are looked up, about; long clips give those with the smallest keys
NEXT = 8  # clips that a clip is compared with for one hash they share, and with the first that has it
FEW_KEYS = 18  # log2 of the hashes up to which a hash alone is rare enough; each doubling adds a bit of the next hash
COMMON, COMMON_SHARE = 100, 0.1  # a hash in more clips than both says nothing
NEAR = 3  # hashes on both sides of a shared one that are compared before all are
NEAR_SHARE = 0.66  # of their bits: unrelated clips pass one time in a thousand
LEAST_COVER = 0.5
BLOCK = 1 << 20  # hashes or candidates worked on at a time
PART = 1 << 22  # hashes sorted at a time: less than 0.5 GB, however many clips there are


class Group(NamedTuple):
    """Clips that are the same, in the order of the index: the first is kept."""

    rows: tuple[int, ...]
    keys: tuple[str, ...]
    value: str  # the audio digest that they share; for near duplicates the key of the first


class Pair(NamedTuple):
    """Two clips that are one recording, the earlier row first."""

    rows: tuple[int, int]
    keys: tuple[str, str]
    similarity: float  # share of equal bits
    overlap: float  # seconds compared
    cover: float  # share of the longer clip on which the shorter lies


class Fingerprints(NamedTuple):
    """The fingerprints of all rows in one row of numbers."""

    hashes: np.ndarray  # (all hashes,) uint32
    starts: np.ndarray  # (rows,) int64: where each row's begin
    counts: np.ndarray  # (rows,) int64: 0 where it has none

    def of(self, row: int) -> np.ndarray:
        return self.hashes[self.starts[row] : self.starts[row] + self.counts[row]]


def codes(column: Any) -> tuple[np.ndarray, list[str]]:
    """A column of strings as (rows,) int64 numbers of its distinct values, -1 for null or empty, and the values."""
    coded, values = _encoded(column)
    return coded, [value or "" for value in values.to_pylist()]


def _encoded(column: Any) -> tuple[np.ndarray, Any]:
    """As `codes`, with the values as an Arrow array: of a million digests few are asked for."""
    encoded = column.dictionary_encode()
    chunks: list[Any] = encoded.chunks if isinstance(encoded, pa.ChunkedArray) else [encoded]
    if not chunks:
        return np.zeros(0, np.int64), column.combine_chunks()
    coded = np.concatenate([numbers(chunk.indices, -1) for chunk in chunks]).astype(np.int64)
    values = chunks[-1].dictionary
    for empty in np.flatnonzero(numbers(pc.binary_length(values)) == 0).tolist():
        coded[coded == empty] = -1
    return coded, values


def exact_duplicates(table: Any) -> list[Group]:
    """Groups of two or more rows with one `audio_digest`, by their first rows. Reads `key` and `audio_digest`."""
    coded, values = _encoded(table["audio_digest"])
    counts = np.bincount(coded[coded >= 0], minlength=len(values) + 1)
    rows = np.flatnonzero((coded >= 0) & (counts[coded] > 1))
    if not len(rows):
        return []
    rows = rows[np.argsort(coded[rows], kind="stable")]
    ends = np.flatnonzero(np.diff(coded[rows], append=-1)) + 1
    keys = table["key"].take(rows_at(rows)).to_pylist()
    names = values.take(rows_at(coded[rows[ends - 1]])).to_pylist()
    listed = rows.tolist()
    spans = zip([0, *ends[:-1].tolist()], ends.tolist(), names, strict=True)
    return sorted(Group(tuple(listed[a:b]), tuple(keys[a:b]), name) for a, b, name in spans)


def near_duplicates(table: Any, least_cover: float = LEAST_COVER) -> list[Pair]:
    """Pairs of rows that are one recording though their digests differ, in order of their rows.

    Reads `key`, `audio_digest` and `fingerprint`. Of clips that are all alike only as many pairs are given as link them
    (`linked` groups them). `least_cover` is the share of the longer clip that the shorter must cover: 0 also finds a
    sentence cut out of a lecture. Clips in which less than about 1.1 s is heard, silence above all, match nothing.
    """
    prints = fingerprints(table)
    for group in exact_duplicates(table):
        prints.counts[list(group.rows[1:])] = 0
    silent = np.searchsorted(prints.starts, np.flatnonzero(prints.hashes == 0), side="right") - 1  # rows of zeros
    heard = prints.counts - np.bincount(silent, minlength=len(prints.counts))
    prints.counts[heard < LEAST_OVERLAP] = 0
    links = _Links()
    found: list[tuple[int, int, float, float, float]] = []
    for a, b in _candidates(prints):
        if links.root(a) == links.root(b):
            continue
        made = match(prints.of(a), prints.of(b))
        cover = _cover(int(prints.counts[a]), int(prints.counts[b]), made.shift)
        if alike(made) and cover >= least_cover:
            links.join(a, b)
            found.append((a, b, made.similarity, made.overlap * HOP_SECONDS, cover))
    keys = table["key"].take(rows_at(np.array([pair[:2] for pair in found], np.int64).ravel())).to_pylist()
    return [Pair((a, b), (keys[2 * n], keys[2 * n + 1]), *rest) for n, (a, b, *rest) in enumerate(found)]


def linked(pairs: Iterable[Pair]) -> list[Group]:
    """Near duplicates as groups: all that are linked by pairs, in order, the first to be kept."""
    links = _Links()
    keys: dict[int, str] = {}
    for pair in pairs:
        links.join(*pair.rows)
        keys.update(zip(pair.rows, pair.keys, strict=True))
    members: dict[int, list[int]] = {}
    for row in sorted(keys):
        members.setdefault(links.root(row), []).append(row)
    return [Group(tuple(rows), tuple(keys[row] for row in rows), keys[first]) for first, rows in members.items()]


def fingerprints(table: Any) -> Fingerprints:
    """The column `fingerprint` of an index; null is an empty one."""
    column = table["fingerprint"]
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    values: list[np.ndarray] = []
    counts = [np.zeros(0, np.int64)]
    for chunk in chunks:
        values.append(numbers(chunk.flatten()))  # leaves out what null rows may hold
        counts.append(numbers(chunk.value_lengths()))
    lengths = np.concatenate(counts).astype(np.int64)
    hashes = values[0] if len(values) == 1 else np.concatenate([np.zeros(0, np.uint32), *values])
    return Fingerprints(hashes.astype(np.uint32, copy=False), np.cumsum(lengths) - lengths, lengths)


class _Links:
    """Which rows belong together: the root of a row is the earliest that it is joined to."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}

    def root(self, row: int) -> int:
        top = row
        while (parent := self.parents.get(top, top)) != top:
            top = parent
        while (parent := self.parents.get(row, row)) != top:
            self.parents[row], row = top, parent
        return top

    def join(self, a: int, b: int) -> None:
        first, second = sorted((self.root(a), self.root(b)))
        self.parents[second] = first


def _cover(count_a: int, count_b: int, shift: int) -> float:
    return (min(count_a, count_b + shift) - max(0, shift)) / max(count_a, count_b)


def _candidates(prints: Fingerprints) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share a hash around which they sound alike, sorted; the work grows with the hashes."""
    expected = int(np.minimum(prints.counts, PER_CLIP).sum())
    parts = expected // PART + 1
    pairs = [_pairs_of(prints, expected, part, parts) for part in range(parts)]
    for number in np.unique(np.concatenate(pairs)).tolist():
        yield divmod(number, len(prints.counts))


def _pairs_of(prints: Fingerprints, expected: int, part: int, parts: int) -> np.ndarray:
    """Candidates by the hashes of one part, as numbers `first row * rows + second row`."""
    packed, width = _packed_keys(prints, expected, part, parts)
    packed.sort()
    keys, places = packed >> np.uint64(width), (packed & np.uint64((1 << width) - 1)).astype(np.int64)
    rows = np.searchsorted(prints.starts, places, side="right") - 1
    starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
    sizes = np.diff(starts, append=len(keys))
    bucket = np.repeat(np.arange(len(starts)), sizes)
    common = np.repeat(sizes > max(COMMON, COMMON_SHARE * np.count_nonzero(prints.counts)), sizes)
    pairs = [np.zeros(0, np.int64)]
    for step in range(NEXT + 1):  # step 0: with the first of the bucket
        later = np.flatnonzero(~common[step:] & (bucket[step:] == bucket[: max(0, len(bucket) - step)])) + step
        earlier = starts[bucket[later]] if step == 0 else later - step
        apart = rows[earlier] != rows[later]
        pairs.append(_near_alike(prints, places, rows, earlier[apart], later[apart]))
    return np.unique(np.concatenate(pairs))


def _packed_keys(prints: Fingerprints, expected: int, part: int, parts: int) -> tuple[np.ndarray, int]:
    """(keys,) uint64 with a hash, mixed, in the upper bits and its place in the lower `width`.

    Which hashes of a long clip are kept is decided by the hash, so that two copies keep the same (as in min-hash).
    """
    hashes = prints.hashes
    width = max(1, len(hashes).bit_length())
    low = np.uint64((1 << width) - 1)
    extra = np.uint64((1 << max(0, expected.bit_length() - FEW_KEYS)) - 1)
    keep = np.minimum(PER_CLIP / np.maximum(prints.counts, 1), 1.0) * (prints.counts > 0)
    limits = (keep * 2**32).astype(np.int64)
    packed = [np.zeros(0, np.uint64)]
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK].astype(np.uint64)
        following = np.zeros_like(block)
        after = hashes[start + 1 : start + 1 + len(block)]
        following[: len(after)] = after
        mixed = _mix(block | (following & extra) << np.uint64(32))
        order = (mixed >> np.uint64(32)).astype(np.int64)
        first, last = np.searchsorted(prints.starts, (start, start + len(block) - 1), side="right") - 1
        edges = np.append(prints.starts[first + 1 : last + 1], start + len(block))
        here = np.repeat(limits[first : last + 1], np.diff(edges, prepend=start))
        chosen = (block != 0) & (order < here) & (order % parts == part)
        at = np.flatnonzero(chosen)
        packed.append(mixed[at] & ~low | (at + start).astype(np.uint64))
    return np.concatenate(packed), width


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014), which spreads near numbers over all 64 bits."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = numbers ^ numbers >> np.uint64(31)
    return mixed


def _near_alike(
    prints: Fingerprints, places: np.ndarray, rows: np.ndarray, earlier: np.ndarray, later: np.ndarray
) -> np.ndarray:
    """Numbers `first row * rows + second row` of the candidates whose hashes around the shared one agree as well."""
    kept: list[np.ndarray] = []
    for start in range(0, len(earlier), BLOCK):
        a, b = earlier[start : start + BLOCK], later[start : start + BLOCK]
        row_a, row_b = rows[a], rows[b]
        place_a, place_b = places[a], places[b]
        different, compared = np.zeros(len(a), np.int64), np.zeros(len(a), np.int64)
        for step in (*range(-NEAR, 0), *range(1, NEAR + 1)):
            hash_a, hash_b = (_neighbour(prints, *pair, step) for pair in ((place_a, row_a), (place_b, row_b)))
            both = (hash_a != 0) & (hash_b != 0)
            different += np.bitwise_count(hash_a ^ hash_b) * both
            compared += 32 * both
        good = different <= (1 - NEAR_SHARE) * compared
        kept.append(np.unique(row_a[good] * len(prints.counts) + row_b[good]))
    return np.concatenate([np.zeros(0, np.int64), *kept])


def _neighbour(prints: Fingerprints, places: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
    """The hashes `step` after `places`, 0 where that is outside the row."""
    at = places + step
    first = prints.starts[rows]
    inside = (at >= first) & (at < first + prints.counts[rows])
    return np.where(inside, prints.hashes[np.where(inside, at, 0)], np.uint32(0))
