"""A lone training worker: what kills it or passes costs a try, all else is said at once; processes are kept warm."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import remote
from pipelines.config import RunConfig
from pipelines.crew import over_shards
from pipelines.resources import Resources, StageResources, during

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    from infra import cluster

    cluster.disconnect()
    cluster.connect("local", 2)
    yield
    cluster.disconnect()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(arch="funasr_llm", data=str(tmp_path), lake=str(tmp_path / "lake"), cpus=2)


def pids(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def train(config: RunConfig, folder: Path, fault: Callable[[], object]) -> None:
    """A training whose tries write down their process; all but the third meet the fault."""

    def loop(settings: dict[str, Any]) -> None:
        with open(folder / "pids", "a+") as file:  # this goes to the worker as it is: nothing of this module is there
            file.write(f"{os.getpid()}\n")
            file.seek(0)
            tries = len(file.readlines())
        if tries < 3:
            fault()

    remote.train(config, loop, {}, str(folder / "state"))


def test_a_killed_worker_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert len(set(pids(tmp_path))) == 3


def test_a_fault_of_a_store_may_pass(config: RunConfig, tmp_path: Path) -> None:
    def away() -> None:
        raise ConnectionError("the store is away")

    train(config, tmp_path, away)
    assert len(pids(tmp_path)) == 3


def test_another_fault_is_raised_as_it_is_and_not_tried_again(config: RunConfig, tmp_path: Path) -> None:
    def wrong() -> None:
        raise ValueError("a wrong setting")

    with pytest.raises(ValueError, match=r"^a wrong setting$"):
        train(config, tmp_path, wrong)
    assert len(pids(tmp_path)) == 1


def processes(config: RunConfig) -> set[int]:
    """Those that work on eight items."""

    def setup() -> Callable[[int], int]:
        return lambda item: os.getpid()

    return {process for _, process in over_shards(config, setup, (), range(8))}


def test_the_processes_of_a_stage_go_on_warm_in_the_next(config: RunConfig, tmp_path: Path) -> None:
    first = processes(config)
    assert processes(config) <= first
    (tmp_path / "pids").write_text("1\n2\n")
    train(config, tmp_path, bool)
    one = pids(tmp_path)[-1]
    assert one in first
    assert remote.call(config, lambda: os.getpid()) == one
    assert [process for process in first - {one} if psutil.pid_exists(process)] == []


def test_warm_processes_let_go_of_their_cores(config: RunConfig, tmp_path: Path) -> None:
    """What they hold is not what this training asks for; it wants both cores."""
    first = processes(config)
    (tmp_path / "pids").write_text("1\n2\n")
    settings = config.model_copy(update={"resources": StageResources(train=Resources(memory=0.1))})
    with during("train"):
        train(settings, tmp_path, bool)
    assert pids(tmp_path)[-1] not in first
