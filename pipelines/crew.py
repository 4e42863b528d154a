"""Actors that work through shards: one a core or a GPU, replaced when they die, kept warm for the next stage.

What crosses a process border is small: URLs, manifests, rows of an index, sums. Features and weights stay in the lake.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from infra import cluster, storage
from pipelines import resources
from pipelines.config import RunConfig
from pipelines.connection import alive, is_local, patience, reach, said
from pipelines.resources import Resources

Item = TypeVar("Item")
RETRIES = 2
EARLY = 4  # actors that are started before it is known how much work there is
LOSSES = 4  # nodes that a piece of work may lose before the run ends: it is not known whose fault that is
SHARD_TIMEOUT = 1800.0  # seconds that one shard may take before its actor is replaced
START_TIMEOUT = 900.0  # seconds within which some actor has to be placed and set up


class Crashed(RuntimeError):
    """A piece of work took its process down or hung every time that it was tried."""

    def __init__(self, item: Any, reason: str) -> None:
        super().__init__(reason)
        self.item, self.reason = item, reason


def over_shards(
    config: RunConfig,
    setup: Callable[..., Callable[[Item], Any]],
    arguments: tuple[Any, ...],
    items: Sequence[Item],
    gpus: bool = False,
) -> Iterator[tuple[Item, Any]]:
    """`Crew.over` with a crew of its own: `setup(*arguments)` in each actor, what it returns on every item."""
    with Crew(config, setup, arguments, len(items), gpus) as crew:
        yield from crew.over(items)


@dataclass
class _Job:
    """A piece of work, how often it was tried, and who does it since when."""

    item: Any
    tries: int = 0
    losses: int = 0
    actor: Any = None
    node: str = ""
    began: float = 0.0


class Crew:
    """Actors that each run `setup(*arguments)` once and then its result on item after item: `with Crew(…) as crew`.

    There are at most `most`. With `gpus`, on a cluster that has some, one a GPU; else one a core. Only an actor that
    has been placed and set up is given work, so a cluster that has shrunk goes on with what is left. RuntimeError if
    none gets so far within `START_TIMEOUT`, or their processes end while they set up; what `setup` raises is raised.
    """

    def __init__(
        self,
        config: RunConfig,
        setup: Callable[..., Callable[..., Any]],
        arguments: tuple[Any, ...],
        most: int,
        gpus: bool = False,
    ) -> None:
        self.ray = reach(config)
        self.setup, self.arguments = setup, arguments
        wants = resources.asked(config.resources)
        room, self.share = _share(self.ray, config, wants, gpus)
        self.size = max(1, min(most, room))
        options = resources.options(self.share) | ({"scheduling_strategy": "SPREAD"} if wants.spread else {})
        self.hire = self.ray.remote(max_restarts=0, **options)(_Hand).remote
        self.warm = cluster.ours() and self.share == {"CPU": 1}
        if not self.warm:
            let_go(self.ray)
        self.hint = resources.hinted(wants, self.share, self.size)
        self.starting: dict[Any, Any] = {}
        self.idle: list[tuple[Any, str]] = []  # actors and their nodes
        self.busy: dict[Any, _Job] = {}
        self.failed = 0  # actors that ended in their set-up, one after the other
        self.manned = time.monotonic()  # when there was last an actor that could work

    def __enter__(self) -> Self:
        self.hint.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cluster.warm += [actor for actor, _ in self.idle]
        for actor in [*self.starting.values(), *(job.actor for job in self.busy.values())]:
            self.ray.kill(actor)
        if not self.warm:
            let_go(self.ray)
        self.hint.__exit__(None, None, None)

    def over(self, items: Sequence[Item], *common: Any) -> Iterator[tuple[Item, Any]]:
        """Work on every item, as `function(item, *common)`; yields as results come. `common` is sent to a node once.

        An actor that dies or exceeds `SHARD_TIMEOUT` is replaced and its item tried again; after `RETRIES` the result
        is a `Crashed`, and the rest goes on. An actor that went with its node is no fault of its item: only after
        `LOSSES` of them RuntimeError is raised. An exception raised by the work itself is raised here.
        """
        shared = [self.ray.put(value) for value in common]
        waiting = deque(_Job(item) for item in items)
        while waiting or self.busy:
            self._recruit(min(self.size, len(waiting) + len(self.busy)))
            while self.idle and waiting:
                self._assign(waiting.popleft(), shared)
            for ref in self._reports():
                if ref in self.starting:
                    self._take_on(ref)
                    continue
                job = self.busy.pop(ref)
                result, again = self._result(ref, job)
                if again:
                    waiting.appendleft(job)
                else:
                    yield job.item, result

    def _recruit(self, wanted: int) -> None:
        for _ in range(wanted - len(self.starting) - len(self.idle) - len(self.busy)):
            actor = cluster.warm.pop() if cluster.warm else self.hire()
            self.starting[actor.set_up.remote(self.setup, self.arguments)] = actor

    def _assign(self, job: _Job, shared: list[Any]) -> None:
        job.actor, job.node = self.idle.pop()
        job.began = time.monotonic()
        self.busy[job.actor.work.remote(job.item, *shared)] = job

    def _reports(self) -> list[Any]:
        """Work and set-ups that have ended, and work that is late."""
        ready, _ = self.ray.wait([*self.busy, *self.starting], num_returns=1, timeout=1.0)
        now = time.monotonic()
        if self.busy or self.idle or ready:
            self.manned = now
        if now - self.manned > START_TIMEOUT:
            raise RuntimeError(
                f"no worker was ready within {START_TIMEOUT:.0f} s: each asks for {resources.told(self.share)} of a "
                f"cluster that has {resources.told(self.ray.available_resources())} free; is it busy with other work, "
                "and are its nodes alive?"
            )
        late = [ref for ref, job in self.busy.items() if ref not in ready and now - job.began > SHARD_TIMEOUT]
        return [*ready, *late]

    def _take_on(self, ref: Any) -> None:
        actor, errors = self.starting.pop(ref), self.ray.exceptions
        try:
            self.idle.append((actor, self.ray.get(ref)))
            self.failed = 0
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            self.ray.kill(actor)
            self.failed += 1
            if self.failed > self.size + RETRIES:
                raise RuntimeError(
                    f"{self.failed} workers ended one after the other while they set up: is there enough memory, and "
                    f"is this code on every node? The last one: {error}"
                ) from None

    def _result(self, ref: Any, job: _Job) -> tuple[Any, bool]:
        """What came of a piece of work that has ended or is late, and whether it is to be tried again."""
        errors = self.ray.exceptions
        try:
            result = self.ray.get(ref, timeout=0.0 if time.monotonic() - job.began > SHARD_TIMEOUT else None)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.GetTimeoutError:
            reason, lost = "hung", self._is_lost(job.node)
        except (errors.ActorUnavailableError, errors.ObjectLostError):  # Ray cannot reach where it ran
            reason, lost = "", True
        except (errors.RayActorError, errors.OutOfMemoryError) as error:
            reason, lost = "took its process down", getattr(error, "preempted", False) or self._is_lost(job.node)
        else:
            self.idle.append((job.actor, job.node))
            return result, False
        self.ray.kill(job.actor)
        if not lost:
            job.tries += 1
            return Crashed(job.item, reason), job.tries <= RETRIES
        job.losses += 1
        for actor in [actor for actor, node in self.idle if node == job.node]:
            self.ray.kill(actor)
        self.idle = [pair for pair in self.idle if pair[1] != job.node]
        if job.losses > LOSSES:
            raise RuntimeError(
                f"{job.losses} nodes were lost while they worked on the same shard: is their memory enough? Run the "
                "same command again, what is finished is kept"
            )
        return None, True

    def _is_lost(self, node: str) -> bool:
        return node not in alive(self.ray)


def begin(config: RunConfig, place: str) -> None:
    """Start Ray and its actors already, beside the imports of what will use them: where they are to run here, and the
    stage ingest will surely need them.

    `place`: folder of the lake in which there is nothing of this data set yet.
    """

    def start() -> None:
        there = not storage.is_local(config.data) or storage.local_path(config.data).exists()
        names = storage.list_names(storage.join(config.lake, place))
        if not there or any(name.startswith(config.dataset_name) for name in names):
            return
        ray = reach(config)
        if resources.of(config.resources, "ingest") == Resources():
            cluster.warm += [
                ray.remote(max_restarts=0, num_cpus=1)(_Hand).remote() for _ in range(min(config.cores(), EARLY))
            ]
            for actor in cluster.warm:
                actor.once.remote(_warm_up, ())

    if is_local(config):
        cluster.begin(start)


def _warm_up() -> None:
    """Half of what an actor's start takes."""
    import pipelines.workers.ingest  # noqa: F401


def let_go(ray: Any) -> None:
    """End the processes that wait for more work: others want their cores and their memory."""
    for actor in cluster.warm:
        ray.kill(actor)
    cluster.warm.clear()


class _Hand:
    """One worker process: sets up, then works item by item; and again for other work, with its imports done."""

    function: Callable[..., Any] | None = None

    def set_up(self, setup: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> str:
        """Apart from `__init__`, so that what it raises is told from a process that ended; gives the node's id."""
        import ray

        self._forget()
        self.function = setup(*arguments)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def work(self, item: Any, *common: Any) -> Any:
        assert self.function is not None
        return self.function(item, *common)

    def once(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self._forget()
        return function(*arguments)

    def _forget(self) -> None:
        """What was held for earlier work makes room first."""
        self.function = None
        gc.collect()


def _share(ray: Any, config: RunConfig, wants: Resources, gpus: bool) -> tuple[int, resources.Share]:
    """How many actors there are to be, and what each asks for: as the stage needs, and as the person said."""
    there = ray.cluster_resources()
    cores = min(there.get("CPU", 1.0), config.cpus or float("inf"))
    cards = int(there.get("GPU", 0)) if gpus else 0
    if wants == Resources():
        return (cards, {"GPU": 1, "CPU": min(1.0, cores / cards)}) if cards else (int(cores), {"CPU": 1})
    asks = resources.share(wants, 1.0, 1.0 if cards else 0.0)
    with resources.hinted(wants, asks, wants.workers or 1):
        resources.wait_for_room(ray, asks, 1, said, patience(config))
    room = wants.workers or resources.room(resources.totals(ray), asks)
    return (min(room, int(config.cpus / asks["CPU"])) if config.cpus else room), asks
