"""The run that is going on in this process: the chain shares one `Workspace`, a stage alone makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pipelines.config import RunConfig
from pipelines.locate import Workspace

_current: ContextVar[Workspace | None] = ContextVar("workspace", default=None)
_bases: dict[str, str] = {}


def workspace(config: RunConfig) -> Workspace:
    """The chain's workspace if its settings are these, else a new one."""
    current = _current.get()
    work = current if current is not None and current.config == config else Workspace(config)
    base = _bases.get(config.model_dump_json())
    if base is not None:
        work.base_digest = base
    return work


def remember(config: RunConfig, base: str) -> None:
    """The base digest as a job worked it out: where its encoders computed is part of it, and not what we have here."""
    _bases[config.model_dump_json()] = base


@contextmanager
def shared(config: RunConfig) -> Iterator[Workspace]:
    """Share what is worked out once (sources, encoders, digests) between the stages of a chain, and with its caller."""
    token = _current.set(workspace(config))
    try:
        yield workspace(config)
    finally:
        _current.reset(token)
