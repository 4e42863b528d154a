"""The run that is going on in this process: the chain shares one `Workspace`, a stage alone makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipelines.config import RunConfig
from pipelines.locate import Workspace

_current: ContextVar[Workspace | None] = ContextVar("workspace", default=None)


def workspace(config: RunConfig) -> Workspace:
    """The chain's workspace if its settings are these, else a new one."""
    current = _current.get()
    return current if current is not None and current.config == config else Workspace(config)


@contextmanager
def shared(config: RunConfig) -> Iterator[Workspace]:
    """Share what is worked out once (sources, encoders, digests) between the stages of a chain."""
    token = _current.set(Workspace(config))
    try:
        yield workspace(config)
    finally:
        _current.reset(token)
