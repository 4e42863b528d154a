"""A Prefect server asked the way its pages ask it: plain REST."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from infra import services

FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Server:
    """The REST API of a server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return services.get(f"{self.url}{path}", None, body, seconds=60)

    def start(self, deployment: str, config: dict[str, Any]) -> str:
        """What the button of the form does; returns the id of the run."""
        found = self.ask(f"/deployments/name/{deployment}")
        body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
        made = self.ask(f"/deployments/{found['id']}/create_flow_run", body)
        return str(made["id"])

    def run(self, identity: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"/flow_runs/{identity}")
        return found

    def ended(self, identity: str, seconds: float = 500) -> dict[str, Any]:
        """The run once it has ended; AssertionError after that many seconds."""
        self.until(lambda: self.run(identity)["state"]["type"] in FINAL, seconds)
        return self.run(identity)

    def until(self, ready: Callable[[], object], seconds: float = 500) -> None:
        began = time.monotonic()
        while not ready():
            assert time.monotonic() - began < seconds, "it did not come so far in time"
            time.sleep(0.25)

    def stages(self, identity: str) -> dict[str, str]:
        """Name of each stage of a chain -> its state."""
        body = {"flow_runs": {"parent_flow_run_id": {"any_": [identity]}}}
        return {each["name"]: each["state"]["name"] for each in self.ask("/flow_runs/filter", body)}

    def artifacts(self, identity: str) -> dict[str, dict[str, Any]]:
        """Key -> artifact of a run and of its stages."""
        parts = self.ask("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [identity]}}})
        body = {"artifacts": {"flow_run_id": {"any_": [identity, *(each["id"] for each in parts)]}}, "limit": 200}
        return {each["key"]: each for each in self.ask("/artifacts/filter", body)}

    def log(self, identity: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [identity]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(line["message"] for line in self.ask("/logs/filter", body))


def below(pid: int) -> list[psutil.Process]:
    """Processes of a flow run: all below its worker's."""
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those that have not gone, with what they do; a process that only waits to be reaped is gone."""
    found = []
    for each in processes:
        try:
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{each.pid} {' '.join(each.cmdline())[:100]}")
        except psutil.NoSuchProcess:
            continue
    return found
