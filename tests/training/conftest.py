"""Where checkpoints go, a clock that only counts, and ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from components.training import checkpoint
from components.training.checkpoint import Checkpoints


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
        return
    yield f"memory://{tmp_path.name}/checkpoints"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, none of them really."""
    slept: list[float] = []
    monkeypatch.setattr(checkpoint.time, "sleep", slept.append)
    return slept


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], list[Checkpoints]]:
    """Ranks in one process: their only collective call is replaced by its answer."""
    monkeypatch.setattr(checkpoint, "_largest", lambda number, world: number)
    monkeypatch.setattr(checkpoint, "POLL", (0.001, 0.01))

    def build(url: str, world: int) -> list[Checkpoints]:
        group = [Checkpoints(url, rank, world) for rank in range(world)]
        for each in group:
            each._run = group[0]._run
        return group

    return build
