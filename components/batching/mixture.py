"""How often each sample of a stage comes per epoch: task and data-set weights, temperature, and whose turn it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from components.batching.samples import Samples
from components.curriculum.tasks import generic_name
from models.recipe import Stage

GOLDEN = 0.6180339887498949  # phases that are multiples of it spread the turns of rare samples evenly
DIGITS = 9  # weights are rounded, so that what is 1 on paper is 1 and such a sample is never left out by 1e-16


def task_weight(tasks: Mapping[str, float], task: str) -> float:
    """What a recipe says about a task under its own name, else under its generic one; 0 if it says nothing."""
    return tasks.get(task, tasks.get(generic_name(task), 0.0))


def sample_weights(stage: Stage, samples: Samples, usable: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Expected times per epoch, `(samples,)`: task x data set x temperature; 0 where `usable` is false.

    The temperature makes the shares of the data sets go as size^(1/temperature), where the size counts what the other
    weights leave of a data set, and keeps the size of the epoch. ValueError for a weight below 0.
    """
    table = _table(stage, samples.tasks, samples.collections)  # (tasks, collections): the only values there are
    cell = samples.task.astype(np.int32) * len(samples.collections) + samples.collection
    counts = np.bincount(cell[usable], minlength=table.size).reshape(table.shape)
    table = np.round(table * tempered((counts * table).sum(axis=0), stage.temperature), DIGITS)
    weights: NDArray[np.float64] = table.ravel()[cell]
    weights[~usable] = 0.0
    return weights


def tempered(sizes: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Factor for each data set, so that sizes x factors go as sizes^(1/temperature) and have the same sum."""
    if temperature == 1:
        return np.ones(len(sizes))
    # Relative to the largest: a power of ten million could leave the range of a float at a low temperature.
    relative = sizes / max(float(sizes.max(initial=0.0)), 1e-300)
    wanted = relative ** (1 / temperature)
    scale = relative.sum() / max(float(wanted.sum()), 1e-300)
    factors: NDArray[np.float64] = np.divide(scale * wanted, relative, out=np.ones(len(sizes)), where=relative > 0)
    return factors


def turns(weights: NDArray[np.float64], epoch: int) -> NDArray[np.int32]:
    """How often each sample comes in an epoch, `(samples,)`.

    A weight of 0.25 takes a sample in every fourth epoch, 2 takes it twice, 1.5 once and twice in turn.
    """
    whole = np.floor(weights)
    count = whole.astype(np.int32)
    rotating = np.flatnonzero(weights != whole)
    if len(rotating):
        part = weights[rotating] - whole[rotating]
        phase = (rotating * GOLDEN) % 1.0
        count[rotating] += (np.floor((epoch + 1) * part + phase) - np.floor(epoch * part + phase)).astype(np.int32)
    return count


def draw(weights: NDArray[np.float64], epoch: int) -> NDArray[np.int32]:
    """The samples of an epoch in their own order, each as often as it is its turn."""
    count = turns(weights, epoch)
    if count.max(initial=0) <= 1:
        return np.flatnonzero(count).astype(np.int32)
    return np.repeat(np.arange(len(count), dtype=np.int32), count)


def _table(stage: Stage, tasks: Sequence[str], collections: Sequence[str]) -> NDArray[np.float64]:
    for name, weight in (*stage.tasks.items(), *stage.datasets.items()):
        if not 0 <= weight < np.inf:
            raise ValueError(f"stage {stage.name}: {name} has the weight {weight}, give it one of 0 or more")
    by_task = np.array([task_weight(stage.tasks, task) for task in tasks])
    by_collection = np.array([stage.datasets.get(name, 1.0) for name in collections])
    return np.outer(by_task, by_collection)
