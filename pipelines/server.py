"""Prefect's API: the server that a person names, that of `earloom up`, or the temporary one that Prefect starts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_greeting: threading.Thread | None = None


def wake() -> None:
    """Begin to reach the API in the background: a temporary server takes as long to start as our imports."""
    global _greeting
    if _greeting is None:
        _take_team()
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


def _take_team() -> None:
    """Where no API is named, take the server of `earloom up` if it answers; $EARLOOM_USE_UP=0 says no.

    Prefect reads its settings when it is imported. MLflow's address is not taken: the registry would move silently.
    """
    if os.environ.get("EARLOOM_USE_UP") == "0" or os.environ.get("PREFECT_API_URL") or "prefect" in sys.modules:
        return
    own = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or own / "profiles.toml")
    if profiles.is_file() and "PREFECT_API_URL" in profiles.read_text():
        return
    from infra import running
    from infra.environment import home

    os.environ.update(running.client_environment(home(), servers=("prefect",)))


def _greet() -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.api_healthcheck()  # a fault is told by the flow that meets it
