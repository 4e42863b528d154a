"""What runs once on Ray: a function with all cores of a node, or a training on one worker or several.

This, `pipelines.crew` and `pipelines.connection` are the only places that put component functions on Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from infra import cluster, storage, stores
from pipelines import resources
from pipelines.config import RunConfig
from pipelines.connection import alive, patience, reach, said
from pipelines.crew import LOSSES, RETRIES, let_go

Result = TypeVar("Result")
NOTICED = 30.0  # seconds after which Ray knows that a node is gone


def call(config: RunConfig, function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function once, in another process with all cores of a node."""
    ray = reach(config)
    wants = resources.asked(config.resources)
    widest = max(node.get("CPU", 1.0) for node in resources.totals(ray))
    asks = resources.share(wants, min(config.cores(), widest))
    with resources.hinted(wants, asks, 1):
        resources.wait_for_room(ray, asks, 1, said, patience(config))
        result: Result = _once(ray, function, arguments, asks)
    return result


def _once(
    ray: Any, function: Callable[..., Any], arguments: tuple[Any, ...], asks: resources.Share, **options: Any
) -> Any:
    """What a function gives or raises: in a warm process where one is left and will do, else as a task.

    A process that dies there costs a try, as does what the task's option `retry_exceptions` holds.
    """
    passing = tuple(options.get("retry_exceptions", ()))
    task = ray.remote(max_retries=RETRIES, **resources.options(asks), **options)(function)
    hand = cluster.warm.pop() if cluster.warm and asks.keys() == {"CPU"} else None
    let_go(ray)
    try:
        if hand is not None:
            try:
                result = ray.get(hand.once.remote(function, arguments))
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                pass
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, passing):
                    raise
                ray.kill(hand)
            else:
                cluster.warm.append(hand)
                return result
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def train(config: RunConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], state_url: str) -> None:
    """Run a training loop on `config.workers` workers; Ray restarts them when one dies, the loop finds its own place.

    Several are Ray Train's. One needs no group, and for it Ray Train would start five more processes, each with its
    imports: it is a task, or goes on in a warm process of an earlier stage.

    Checkpoints go to the lake by the loop itself: Ray resumes from the last one that its controller has polled, which
    may be older than the last one that was written. A node that is taken away with notice uses up no try; one that
    goes without does, but as long as it is nodes that go, training is begun anew up to `LOSSES` times.
    """
    ray = reach(config)
    wants = resources.asked(config.resources)
    on_card = bool(wants.gpus or wants.accelerator or _gpus())
    asks = resources.share(wants, config.cores_each(), 1.0 if on_card else 0.0)
    with resources.hinted(wants, asks, config.workers):
        resources.wait_for_room(ray, asks, config.workers, said, patience(config))
        for lost in range(LOSSES + 1):
            nodes = alive(ray)
            try:
                if config.workers == 1:
                    _once(ray, loop, (settings,), asks, retry_exceptions=[OSError])
                else:
                    let_go(ray)
                    _fit(config, loop, settings, state_url, asks, wants.placement)
                return
            except (_Failed, ray.exceptions.RayError) as error:
                cause = error.cause if isinstance(error, _Failed) else error
                if lost == LOSSES or not _went(ray, nodes, cause):
                    raise cause from None
                said("a node went while training: it goes on from its last checkpoint with what there is")


def _went(ray: Any, nodes: set[str], cause: Exception) -> bool:
    """Whether one of the nodes is gone; where a worker was lost that is waited for, as Ray notices after seconds."""
    end = time.monotonic() + (NOTICED if isinstance(cause, ray.exceptions.RayError) else 0.0)
    while nodes <= alive(ray):
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
