"""Prefect's API: the server that a person names, that of `earloom up`, or a temporary one that ends with us."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import running, temporary_prefect
from infra.environment import home

_own: temporary_prefect.Temporary | None = None


def wake() -> None:
    """Choose the API, before Prefect is imported, which reads it then. A temporary server starts beside our imports."""
    global _own
    if _own is not None or os.environ.get("PREFECT_API_URL") or "prefect" in sys.modules or _file_names_one():
        return
    # MLflow's address is not taken: the registry would move silently.
    team = {} if os.environ.get("EARLOOM_USE_UP") == "0" else running.client_environment(home(), servers=("prefect",))
    if team:
        os.environ.update(team)
    else:
        _own = temporary_prefect.start()
        os.environ["PREFECT_API_URL"] = _own.url


@contextmanager
def reached() -> Iterator[None]:
    """For flows: a temporary server is ready.

    Under it flows send no heartbeats: nobody listens, and each would wait a second for its last one.
    """
    wake()
    if _own is None:
        yield
        return
    temporary_prefect.wait_for(_own)
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def temporary() -> bool:
    """Whether the API in use is there for us alone."""
    return _own is not None


def _file_names_one() -> bool:
    """Whether a file that Prefect reads its settings from names an API: ours must not win over that."""
    own = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or own / "profiles.toml")
    if any(file.is_file() and "PREFECT_API_URL" in file.read_text() for file in (profiles, Path(".env"))):
        return True
    settings = _toml("prefect.toml"), _toml("pyproject.toml").get("tool", {}).get("prefect", {})
    return any(table.get("api", {}).get("url") for table in settings)


def _toml(name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(name).read_text())
    except (OSError, ValueError):
        return {}
