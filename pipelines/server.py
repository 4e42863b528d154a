"""Prefect's API: a server that a person runs, or the temporary one that Prefect starts by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_greeting: threading.Thread | None = None


def wake() -> None:
    """Begin to reach the API in the background: a temporary server takes as long to start as our imports."""
    global _greeting
    if _greeting is None:
        _greeting = threading.Thread(target=_greet, daemon=True)
        _greeting.start()


@contextmanager
def reached() -> Iterator[None]:
    """For flows: the API was reached or given up on; a flow that runs before would find a server half started.

    Under a temporary server flows send no heartbeats: nobody listens, and each would wait a second for its last one.
    """
    wake()
    assert _greeting is not None
    _greeting.join()
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def _greet() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.api_healthcheck()  # a fault is told by the flow that meets it
