"""k-means of a discrete system on Ray: actors hold the cache open from pass to pass, sums come in the shards' order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from components.features.lloyd import Sums, Sweep
from components.features.store import FeatureStore
from pipelines.config import RunConfig
from pipelines.crew import Crashed, Crew
from pipelines.workers.cache import summer

AHEAD = 4  # shards an actor whose sums may be in memory at once, so that each can be added in its turn


@contextmanager
def on_ray(config: RunConfig, store: FeatureStore, pieces: list[list[str]]) -> Iterator[Sweep]:
    """Sweeps over a finished cache by one actor a core; what they give does not depend on how many there are."""
    with Crew(config, summer, (store.root,), len(pieces)) as crew:
        yield partial(_sweep, crew, pieces)


def _sweep(crew: Crew, pieces: list[list[str]], centres: Tensor) -> Iterator[Sums]:
    together = AHEAD * crew.size
    for begin in range(0, len(pieces), together):
        some = pieces[begin : begin + together]
        numbers = {keys[0]: number for number, keys in enumerate(some)}  # no clip is in two shards
        found: dict[int, Sums] = {}
        for keys, sums in crew.over(some, centres):
            if isinstance(sums, Crashed):
                raise RuntimeError(f"k-means {sums.reason} on the shard of clip {keys[0]}: is there enough memory?")
            found[numbers[keys[0]]] = sums
        yield from (found[number] for number in range(len(some)))
