"""The only place that puts component functions on Ray: actors for shards, one task for evaluation, Train for stages.

What crosses a process border is small: URLs, manifests, rows of an index, sums. Features and weights stay in the lake.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from infra import cluster, storage, stores
from pipelines import resources
from pipelines.config import RunConfig
from pipelines.progress import console
from pipelines.resources import Resources
from pipelines.shipment import runtime_env

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIES = 2
LOSSES = 4  # nodes that a piece of work may lose before the run ends: it is not known whose fault that is
SHARD_TIMEOUT = 1800.0  # seconds that one shard may take before its actor is replaced
NOTICED = 30.0  # seconds after which Ray knows that a node is gone
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
        self.ray = _reach(config)
        wants = resources.asked(config.resources)
        room, self.share = _share(self.ray, config, wants, gpus)
        self.size = max(1, min(most, room))
        options = resources.options(self.share) | ({"scheduling_strategy": "SPREAD"} if wants.spread else {})
        self.hire = partial(self.ray.remote(max_restarts=0, **options)(_Hand).remote, setup, arguments)
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
        working = [job.actor for job in self.busy.values()]
        for actor in [*self.starting.values(), *(actor for actor, _ in self.idle), *working]:
            self.ray.kill(actor)
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
            actor = self.hire()
            self.starting[actor.set_up.remote()] = actor

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
        return node not in _alive(self.ray)


class _Hand:
    """One worker process: sets up once, then works item by item."""

    def __init__(self, setup: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
        self.setup, self.arguments = setup, arguments

    def set_up(self) -> str:
        """Apart from `__init__`, so that what it raises is told from a process that ended; gives the node's id."""
        import ray

        self.function = self.setup(*self.arguments)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def work(self, item: Any, *common: Any) -> Any:
        return self.function(item, *common)


def _reach(config: RunConfig) -> Any:
    """Ray, connected; with the code and environment that were asked for, unless a job has given them to us."""
    return cluster.connect(config.ray_address, config.cores(), runtime_env(config, job=False))


def begin(config: RunConfig, place: str) -> None:
    """Start Ray already, beside the imports of what will use it: where it is to run here, and will surely be needed.

    `place`: folder of the lake in which there is nothing of this data set yet.
    """

    def start() -> None:
        there = not storage.is_local(config.data) or storage.local_path(config.data).exists()
        names = storage.list_names(storage.join(config.lake, place))
        if there and not any(name.startswith(config.dataset_name) for name in names):
            _reach(config)

    if cluster.address_of(config.ray_address) == cluster.LOCAL:
        cluster.begin(start)


def _share(ray: Any, config: RunConfig, wants: Resources, gpus: bool) -> tuple[int, resources.Share]:
    """How many actors there are to be, and what each asks for: as the stage needs, and as the person said."""
    there = ray.cluster_resources()
    cores = min(there.get("CPU", 1.0), config.cpus or float("inf"))
    cards = int(there.get("GPU", 0)) if gpus else 0
    if wants == Resources():
        return (cards, {"GPU": 1, "CPU": min(1.0, cores / cards)}) if cards else (int(cores), {"CPU": 1})
    asks = resources.share(wants, 1.0, 1.0 if cards else 0.0)
    with resources.hinted(wants, asks, wants.workers or 1):
        resources.wait_for_room(ray, asks, 1, _said, _patience(config))
    room = wants.workers or resources.room(resources.totals(ray), asks)
    return (min(room, int(config.cpus / asks["CPU"])) if config.cpus else room), asks


def _patience(config: RunConfig) -> float:
    """Seconds that a cluster has to get larger; what we start on this machine never does."""
    return 0.0 if cluster.address_of(config.ray_address) == cluster.LOCAL else resources.PATIENCE


def _said(line: str) -> None:
    console.print(f"  {line}", soft_wrap=True)


def call(config: RunConfig, function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function once, in a process of its own with all cores of a node."""
    ray = _reach(config)
    wants = resources.asked(config.resources)
    widest = max(node.get("CPU", 1.0) for node in resources.totals(ray))
    asks = resources.share(wants, min(config.cores(), widest))
    with resources.hinted(wants, asks, 1):
        resources.wait_for_room(ray, asks, 1, _said, _patience(config))
        result: Result = _once(ray, function, arguments, asks)
    return result


def _once(
    ray: Any, function: Callable[..., Any], arguments: tuple[Any, ...], asks: resources.Share, **options: Any
) -> Any:
    """A task; what the function raises is raised. Ray gives the next one the same process, if it wants no GPU."""
    task = ray.remote(max_retries=RETRIES, **resources.options(asks), **options)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def train(config: RunConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], state_url: str) -> None:
    """Run a training loop on `config.workers` workers; Ray restarts them when one dies, the loop finds its own place.

    Several are Ray Train's. One needs no group: it is a task, and its warm process goes on to what comes next. (For
    one worker Ray Train would start five more processes, each with its imports.)

    Checkpoints go to the lake by the loop itself: Ray resumes from the last one that its controller has polled, which
    may be older than the last one that was written. A node that is taken away with notice uses up no try; one that
    goes without does, but as long as it is nodes that go, training is begun anew up to `LOSSES` times.
    """
    ray = _reach(config)
    wants = resources.asked(config.resources)
    on_card = bool(wants.gpus or wants.accelerator or _gpus())
    asks = resources.share(wants, config.cores_each(), 1.0 if on_card else 0.0)
    with resources.hinted(wants, asks, config.workers):
        resources.wait_for_room(ray, asks, config.workers, _said, _patience(config))
        for lost in range(LOSSES + 1):
            nodes = _alive(ray)
            try:
                if config.workers == 1:
                    _once(ray, loop, (settings,), asks, retry_exceptions=[OSError])
                else:
                    _fit(config, loop, settings, state_url, asks, wants.placement)
                return
            except (_Failed, ray.exceptions.RayError) as error:
                cause = error.cause if isinstance(error, _Failed) else error
                if lost == LOSSES or not _went(ray, nodes, cause):
                    raise cause from None
                _said("a node went while training: it goes on from its last checkpoint with what there is")


def _alive(ray: Any) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _went(ray: Any, nodes: set[str], cause: Exception) -> bool:
    """Whether one of the nodes is gone; where a worker was lost that is waited for, as Ray notices after seconds."""
    end = time.monotonic() + (NOTICED if isinstance(cause, ray.exceptions.RayError) else 0.0)
    while nodes <= _alive(ray):
        if time.monotonic() > end:
            return False
        time.sleep(1.0)
    return True


class _Failed(Exception):
    """A group of workers ended, and this is why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _fit(
    config: RunConfig,
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    state_url: str,
    asks: resources.Share,
    placement: str,
) -> None:
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchTrainer

    from pipelines.rendezvous import torch_config

    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            resources_per_worker=dict(asks),
            use_gpu="GPU" in asks,
            placement_strategy=placement,
        ),
        torch_config=torch_config("nccl" if "GPU" in asks else "gloo"),
        run_config=TrainRunConfig(
            name=f"ray-{os.getpid()}",
            failure_config=FailureConfig(max_failures=RETRIES, max_preemption_failures=-1),
            **_ray_storage(state_url),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _Failed(_cause(error)) from None
    finally:
        storage.remove_tree(storage.join(state_url, f"ray-{os.getpid()}"))


def _ray_storage(url: str) -> dict[str, Any]:
    if storage.is_local(url):
        folder = storage.local_path(url).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = stores.file_system(url)
    handler = FSSpecHandler(files)  # type: ignore[abstract]  # pyarrow-stubs leave its methods out
    return {"storage_path": path, "storage_filesystem": PyFileSystem(handler)}


def _cause(error: Exception) -> Exception:
    """What went wrong in a worker, without Ray's wrapping where there is one clear cause."""
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values())) if failures else error


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
