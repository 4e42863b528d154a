"""A Ray that is started here does without what nobody looks at: dashboard, autoscaler and the reader of workers' logs.

They are four Python programs, which on two cores take longer to start than all the rest, and `ray.init` waits for two
of them. `include_dashboard=False` leaves its server and its agent running, without pages. The node waits for the agent
to say on which ports it listens, and ends with it; `infra/ray_agent.py` says that it listens on none.

Source: ray/_private/node.py, `Node.start_head_processes` and `start_ray_processes`; ray/_private/services.py,
`start_raylet`; ray/dashboard/agent.py, `DashboardAgent` with `minimal`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AGENT = str(Path(__file__).with_name("ray_agent.py"))
PORTS = ("DASHBOARD_AGENT_LISTEN", "METRICS_AGENT", "METRICS_EXPORT")


@contextmanager
def only() -> Iterator[None]:
    """`ray.init("local")` within it starts no more than the work needs."""
    import ray
    from ray._private import ray_constants, services, utils
    from ray._private.node import Node

    names: Any = ray._raylet  # has no types
    ports = ",".join(getattr(names, f"{name}_PORT_NAME") for name in PORTS)
    program = services._build_python_executable_command_memory_profileable

    def light(component: str, *given: Any, **named: Any) -> list[str]:
        """How a program of Ray's begins; Ray's own file and its options follow."""
        if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT:
            return [sys.executable, "-I", "-S", AGENT, ports]
        return list(program(component, *given, **named))

    changes: list[tuple[Any, str, Any]] = [
        (services, "_build_python_executable_command_memory_profileable", light),
        (services, "start_api_server", _no_server),
        (utils, "get_dashboard_dependency_error", _not_wanted),
        (Node, "start_monitor", _nothing),
        (Node, "start_log_monitor", _nothing),
    ]
    before = [getattr(place, name) for place, name, _ in changes]
    for place, name, ours in changes:
        setattr(place, name, ours)
    try:
        yield
    finally:
        for (place, name, _), theirs in zip(changes, before, strict=True):
            setattr(place, name, theirs)


def _not_wanted() -> ImportError:
    return ImportError("the dashboard is not wanted; to look whether it could run takes half a second")


def _no_server(*_: Any, **__: Any) -> tuple[str, None]:
    """The address of the pages, and no process."""
    return "", None


def _nothing(_: Any) -> None:
    return None
