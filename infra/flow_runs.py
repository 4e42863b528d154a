"""Flow runs, asked of a Prefect server without importing Prefect: which began last, which ended with a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Set
from typing import Any

from infra.services import get

ENDED = "ended together with its worker, by `earloom down`; a new run goes on where this one stopped"
ACTIVE = {"RUNNING", "PENDING", "CANCELLING"}  # types of states


def last(api: str, auth: str | None, many: int) -> list[dict[str, Any]]:
    """The runs that began last, newest first: id, name, state, type, began (ISO, or None), seconds. Raises OSError."""
    begun = {"state": {"type": {"not_any_": ["SCHEDULED"]}}}  # else the schedules of the next days come first
    asked = {"sort": "START_TIME_DESC", "limit": many, "flow_runs": begun}
    return [
        {
            "id": run["id"],
            "name": run["name"],
            "state": run["state_name"] or "",
            "type": run["state_type"] or "",
            "began": run["start_time"],
            "seconds": float(run["total_run_time"] or 0.0),
        }
        for run in get(f"{api}/flow_runs/filter", auth, asked)
    ]


def active(api: str, auth: str | None) -> list[str]:
    """Ids of the runs that go on now. Raises OSError."""
    asked = {"flow_runs": {"state": {"type": {"any_": sorted(ACTIVE)}}}, "limit": 200}
    return [run["id"] for run in get(f"{api}/flow_runs/filter", auth, asked)]


def crash(api: str, auth: str | None, runs: Iterable[str], pids: Set[int]) -> list[str]:
    """Say of those runs that had one of these processes that they crashed: they could not say so themselves.

    Their worker, which was ended as well, may have had time to say it, but not why. Returns the names of the runs;
    those of workers on other machines are left alone.
    """
    state = {"type": "CRASHED", "name": "Crashed", "message": ENDED}
    theirs = {str(pid) for pid in pids}
    crashed = []
    for one in runs:
        with contextlib.suppress(OSError):  # one that is gone by now
            run = get(f"{api}/flow_runs/{one}", auth)
            if run["infrastructure_pid"] in theirs and run["state_type"] in ACTIVE | {"CRASHED"}:
                get(f"{api}/flow_runs/{one}/set_state", auth, {"state": state, "force": True})
                crashed.append(str(run["name"]))
    return crashed
