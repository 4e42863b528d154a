"""Prefect's API: a server that a person runs, or the temporary one that Prefect starts by itself."""

from __future__ import annotations

import threading


def wake() -> None:
    """Start to reach the API in the background: a temporary server takes as long to start as our imports."""
    threading.Thread(target=_greet, daemon=True).start()


def _greet() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.api_healthcheck()  # whoever runs a flow next is told what is wrong, if anything is
