"""The only place that puts component functions on Ray: actors for shards, one task for evaluation, Train for stages.

What crosses a process border is small: URLs, manifests and rows of an index. Features and weights stay in the lake.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from infra import cluster, storage
from pipelines.config import RunConfig

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIES = 2
SHARD_TIMEOUT = 1800.0  # seconds that one shard may take before its actor is replaced


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
    cpus_each: float = 1.0,
) -> Iterator[tuple[Item, Any]]:
    """Run `setup(*arguments)` once in each actor, then what it returns on every item; yields as results come.

    An actor that dies or exceeds `SHARD_TIMEOUT` is replaced and its item tried again; after `RETRIES` the result is
    a `Crashed`, and the rest goes on. An exception raised by the work itself is raised here.
    """
    ray = cluster.connect(config.ray_address, config.cores())
    remote_actor = ray.remote(num_cpus=cpus_each, max_restarts=0)(_Hand)
    size = max(1, min(len(items), int(config.cores() / cpus_each)))
    waiting = [(item, 0) for item in items]
    busy: dict[Any, tuple[Any, Item, int, float]] = {}
    idle = [remote_actor.remote(setup, arguments) for _ in range(size)]
    while waiting or busy:
        while idle and waiting:
            actor, (item, tries) = idle.pop(), waiting.pop(0)
            busy[actor.work.remote(item)] = (actor, item, tries, time.monotonic())
        ready, _ = ray.wait(list(busy), num_returns=1, timeout=1.0)
        late = [
            ref
            for ref, (_, _, _, began) in busy.items()
            if ref not in ready and time.monotonic() - began > SHARD_TIMEOUT
        ]
        for ref in [*ready, *late]:
            actor, item, tries, _ = busy.pop(ref)
            try:
                result = ray.get(ref, timeout=0.0 if ref in late else None)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                ray.kill(actor)
                idle.append(remote_actor.remote(setup, arguments))
                if tries < RETRIES:
                    waiting.append((item, tries + 1))
                else:
                    reason = "hung" if isinstance(error, ray.exceptions.GetTimeoutError) else "took its process down"
                    yield item, Crashed(item, reason)
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            idle.append(actor)
            yield item, result
    for actor in idle:
        ray.kill(actor)


class _Hand:
    """One worker process: sets up once, then works item by item."""

    def __init__(self, setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self.function = setup(*arguments)

    def work(self, item: Any) -> Any:
        return self.function(item)


def call(config: RunConfig, function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function once, in a process of its own with all cores."""
    ray = cluster.connect(config.ray_address, config.cores())
    task = ray.remote(num_cpus=config.cores(), max_retries=RETRIES)(function)
    try:
        result: Result = ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return result


def train(config: RunConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], state_url: str) -> None:
    """Run a training loop on Ray Train's workers; Ray restarts them when one dies, the loop finds its own place.

    Checkpoints go to the lake by the loop itself: Ray resumes from the last one that its controller has polled, which
    may be older than the last one that was written.
    """
    cluster.connect(config.ray_address, config.cores())
    from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.workers, resources_per_worker={"CPU": config.cores_each()}, use_gpu=_gpus() > 0
        ),
        torch_config=TorchConfig(backend="nccl" if _gpus() else "gloo"),
        run_config=TrainRunConfig(
            name=f"ray-{os.getpid()}", failure_config=FailureConfig(max_failures=RETRIES), **_ray_storage(state_url)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error) from None
    finally:
        storage.remove_tree(storage.join(state_url, f"ray-{os.getpid()}"))


def _ray_storage(url: str) -> dict[str, Any]:
    if storage.is_local(url):
        path = storage.local_path(url).resolve()
        path.mkdir(parents=True, exist_ok=True)
        return {"storage_path": str(path)}
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = fsspec.core.url_to_fs(url)
    handler = FSSpecHandler(files)  # type: ignore[abstract]  # pyarrow-stubs leave its methods out
    return {"storage_path": path, "storage_filesystem": PyFileSystem(handler)}


def _cause(error: Exception) -> Exception:
    """What went wrong in a worker, without Ray's wrapping where there is one clear cause."""
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values())) if failures else error


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
