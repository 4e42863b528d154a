"""Prefect's API: a server that a person runs, or the temporary one that Prefect starts by itself."""

from __future__ import annotations

import threading

_greeting: threading.Thread | None = None


def wake() -> None:
    """Begin to reach the API in the background: a temporary server takes as long to start as our imports."""
    global _greeting
    if _greeting is None:
        _greeting = threading.Thread(target=_greet, daemon=True)
        _greeting.start()


def ready() -> None:
    """Wait until the API was reached or given up on; a flow that runs before would find a server half started."""
    wake()
    assert _greeting is not None
    _greeting.join()


def _greet() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.api_healthcheck()  # a fault is told by the flow that meets it
