"""A Ray that is started here does without what nobody looks at: dashboard, autoscaler and the reader of workers' logs.

They are three Python programs, which on two cores take as long to start as all the rest, and `ray.init` waits for one
of them. `include_dashboard=False` leaves its server running, without pages.

Source: ray/_private/node.py, `Node.start_head_processes` and `start_ray_processes`; ray/_private/services.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def only() -> Iterator[None]:
    """`ray.init("local")` within it starts no more than the work needs."""
    from ray._private import services
    from ray._private.node import Node

    before = services.start_api_server, Node.start_monitor, Node.start_log_monitor
    services.start_api_server = _no_server
    Node.start_monitor = Node.start_log_monitor = _nothing
    try:
        yield
    finally:
        services.start_api_server, Node.start_monitor, Node.start_log_monitor = before


def _no_server(*_: Any, **__: Any) -> tuple[str, None]:
    """The address of the pages, and no process."""
    return "", None


def _nothing(_: Any) -> None:
    return None
