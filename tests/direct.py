"""The chain without Prefect and Ray: the same stages, called one after the other in this process.

What the orchestrated chain is held against: it has to register the same weights, and to take hardly longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from components.schema import StageReport
from pipelines.config import RunConfig

_work: Callable[[Any], Any]  # of a process of the pool


def run_directly(config: RunConfig) -> list[StageReport]:
    """Ingest, cache, train, evaluate and register, for a system whose frozen encoder is cached (not for units)."""
    from pipelines.cache import cache_features
    from pipelines.evaluate import evaluate_model
    from pipelines.ingest import ingest_audio
    from pipelines.register import register_model, write_run_report
    from pipelines.train import train_stages
    from pipelines.workspace import shared

    with shared(config) as work, without_ray():
        reports = [ingest_audio.fn(work), cache_features.fn(work), *train_stages.fn(work)]
        reports += [evaluate_model.fn(work), register_model.fn(work)]
        write_run_report(work, reports)
        return reports


def in_processes(
    config: RunConfig,
    setup: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    gpus: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """`crew.over_shards` by a pool of bare processes."""
    size = min(config.cores(), len(items))
    with ProcessPoolExecutor(size, get_context("spawn"), _set_up, (setup, arguments)) as pool:
        yield from zip(items, pool.map(_one, items), strict=True)


def in_this_process(
    config: RunConfig,
    setup: Callable[..., Callable[[Any], Any]],
    arguments: tuple[Any, ...],
    items: Sequence[Any],
    gpus: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """`crew.over_shards` item after item."""
    work = setup(*arguments)
    yield from ((item, work(item)) for item in items)


@contextmanager
def without_ray(over_shards: Callable[..., Iterator[tuple[Any, Any]]] = in_processes) -> Iterator[None]:
    """Shards go to `over_shards`, all else is called in this process."""

    def call(config: RunConfig, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def train(
        config: RunConfig, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], state_url: str
    ) -> None:
        loop(settings)

    with (
        patch("pipelines.crew.over_shards", over_shards),
        patch.multiple("pipelines.remote", call=call, train=train),
    ):
        yield


def _set_up(setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _work
    _work = setup(*arguments)


def _one(item: Any) -> Any:
    return _work(item)
