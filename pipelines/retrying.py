"""Which stages are tried again, how often and after what: all are idempotent by their manifests, so none does harm.

Only where nobody watches, in a run that a worker started, and only faults that may pass: a store, a server or a node
that was away. A wrong setting or a missing file is said at once.
"""

from __future__ import annotations

import os
from typing import Any

LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)


def may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether the fault of a task may be gone at the next try."""
    if "PREFECT__FLOW_RUN_ID" not in os.environ:
        return False
    error = state.result(raise_on_failure=False)
    if isinstance(error, OSError):
        return not isinstance(error, LASTING)
    return type(error).__module__.startswith("ray.exceptions")


# Seconds before each try. What an earlier try has finished is not done again.
INGEST: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [10, 60, 300], "retry_condition_fn": may_pass}
CACHE: dict[str, Any] = INGEST
EVALUATE: dict[str, Any] = {"retries": 2, "retry_delay_seconds": [10, 60], "retry_condition_fn": may_pass}
REGISTER: dict[str, Any] = INGEST
# Ray starts lost workers again by itself; this is for what ends the whole group.
TRAIN: dict[str, Any] = {"retries": 1, "retry_delay_seconds": 60, "retry_condition_fn": may_pass}
