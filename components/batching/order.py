"""The order of an epoch: shards near each other are read together, and a curriculum brings easy samples first."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.batching.samples import Samples
from components.curriculum.tasks import generic_name
from models.recipe import Curriculum, Stage

INCREMENTS = 64  # in so many steps the pool of a paced curriculum grows
CLOSE = 1e-9  # 49 * (1 / 49) is less than 1


def base_order(
    drawn: NDArray[np.int32], shard: NDArray[np.integer], mixing: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Shuffle the drawn samples so that at most `mixing` shards are open at a time.

    drawn: indices of samples, repeated or not; shard: `(samples,)`. The shards come in random order, in groups; within
    a group all samples are mixed. With no more shards than `mixing` this is a full shuffle.
    """
    shuffled = rng.permutation(drawn)
    if not len(drawn):
        return shuffled
    first = int(shard.min())
    of_drawn = shard[shuffled] - first
    present = np.flatnonzero(np.bincount(of_drawn))
    groups = -(-len(present) // mixing)
    if groups == 1:
        return shuffled
    # Groups of nearly equal size rather than full ones and a rest: the rest would be hardly mixed.
    kind = np.uint16 if groups <= 1 << 16 else np.uint32  # numpy sorts 16 bits by radix
    group = np.zeros(int(present[-1]) + 1, dtype=kind)
    group[present] = rng.permutation(len(present)) * groups // len(present)
    return shuffled[np.argsort(group[of_drawn], kind="stable")]


def difficulty(stage: Stage, samples: Samples) -> NDArray[np.floating]:
    """What the stage's curriculum sorts by, `(samples,)`, small = early; nan comes last.

    Raises ValueError for a name that is neither a known order nor a numeric column of the index.
    """
    order = stage.curriculum.order
    found: NDArray[Any]
    if order == "duration":
        found = samples.seconds
    elif order == "tokens":
        found = samples.tokens
    elif order == "tasks":
        names = list(stage.tasks)
        found = np.array([_position(names, task) for task in samples.tasks])[samples.task]
    elif order == "modality":
        found = samples.audio
    elif order in ("text", "rate") and "text_length" in samples.measures:
        found = samples.measures["text_length"]
        if order == "rate":  # without audio there is no rate: the easiest
            found = np.divide(found, samples.seconds, out=np.zeros(len(samples)), where=samples.seconds > 0)
    elif order in samples.measures:
        found = samples.measures[order]
    else:
        raise ValueError(_no_such_order(stage, samples))
    values: NDArray[np.floating] = found.astype(np.result_type(found.dtype, np.float32), copy=False)
    return -values if stage.curriculum.reverse else values


def competence(curriculum: Curriculum, t: float) -> float:
    """Share of the samples, the easiest ones, that may come at a share `t` of the epoch; at least `t`, at most 1.

    `sorted` pacing has no pool: there it is `t` itself.
    """
    start = curriculum.start
    if curriculum.pacing == "linear":
        share = start + (1 - start) * t
    elif curriculum.pacing == "root":
        share = math.sqrt(start**2 + (1 - start**2) * t)
    elif curriculum.pacing == "step":
        share = max(start, (math.floor(curriculum.levels * t + CLOSE) + 1) / curriculum.levels)
    else:
        share = t
    return min(1.0, max(share, t))


def curriculum_order(
    curriculum: Curriculum, ordered: NDArray[np.int32], difficulty: NDArray[np.floating]
) -> NDArray[np.int32]:
    """Bring a random order into the curriculum's; every entry stays in once.

    ordered: `(entries,)` indices into difficulty, which is `(samples,)`. Paced: in each of at most 64 increments the
    entries that come first in the random order are taken from those that are easy enough at its start. Only if all of
    these are used up, the next easiest of the same increment follow.
    """
    easiest = np.argsort(difficulty[ordered], kind="stable").astype(np.int32)  # places in the random order
    if curriculum.pacing == "sorted":
        return ordered[easiest]
    steps = min(curriculum.levels, INCREMENTS) if curriculum.pacing == "step" else INCREMENTS
    count, known = len(ordered), 0
    pool = np.empty(0, dtype=np.int32)  # places of the entries that may come and have not, ascending
    taken = []
    for step in range(steps):
        needed = count * (step + 1) // steps - count * step // steps
        open_to = max(math.floor(count * competence(curriculum, step / steps) + CLOSE), count * (step + 1) // steps)
        pool = np.sort(np.concatenate([pool, easiest[known:open_to]]))
        known = open_to
        taken.append(pool[:needed])
        pool = pool[needed:]
    return ordered[np.concatenate(taken)]


def _position(names: list[str], task: str) -> int:
    known = next((name for name in (task, generic_name(task)) if name in names), None)
    return len(names) if known is None else names.index(known)


def _no_such_order(stage: Stage, samples: Samples) -> str:
    known = ["random", "duration", "tokens", "tasks", "modality"]
    known += ["text", "rate"] if "text_length" in samples.measures else []
    known += [name for name in samples.measures if name not in known]
    order = stage.curriculum.order
    near = difflib.get_close_matches(order, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"stage {stage.name}: no curriculum order {order!r}.{hint} There are: {', '.join(known)}"
