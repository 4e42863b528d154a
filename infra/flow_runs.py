"""Flow runs, asked of a Prefect server without importing Prefect: which began last, which ended with a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Set
from typing import Any

from infra.services import get

ENDED = "ended together with its worker, by `earloom down`; a new run goes on where this one stopped"


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


def crash(api: str, auth: str | None, pids: Set[int]) -> list[str]:
    """Say of the runs that had these processes that they crashed: they were ended and could not say so themselves.

    Returns their names. Runs of workers on other machines are left alone. Raises OSError.
    """
    active = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    crashed = []
    for run in get(f"{api}/flow_runs/filter", auth, {"flow_runs": active, "limit": 200}):
        if run["infrastructure_pid"] not in {str(pid) for pid in pids}:
            continue
        state = {"type": "CRASHED", "name": "Crashed", "message": ENDED}
        with contextlib.suppress(OSError):  # one that is gone by now
            get(f"{api}/flow_runs/{run['id']}/set_state", auth, {"state": state, "force": True})
            crashed.append(str(run["name"]))
    return crashed
