"""What `earloom up`, `status` and `down` print: the services with addresses and logs, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from infra import environment, flow_runs, processes, running
from infra.names import absolute
from infra.running import RUNNING, Seen, Wanted
from pipelines.progress import console

STYLES = {running.RUNNING: "green", running.SILENT: "yellow", running.GONE: "red"}
RUN_STYLES = {"COMPLETED": "green", "RUNNING": "cyan", "FAILED": "red", "CRASHED": "red"}
LAST_RUNS = 5


def folder() -> Path:
    """Where the services keep what they know."""
    return environment.home() / "services"


def up(
    lake: str | None,
    host: str | None,
    prefect_port: int | None,
    mlflow_port: int | None,
    auth: bool,
    names: tuple[str, ...],
) -> None:
    """Start what does not run and show all of it. Raises what `infra.running.up` raises."""
    home = environment.home()
    given = os.environ.get("EARLOOM_AUTH")
    password = (given or running.new_auth(home)) if auth or given else None
    place = lake or os.environ.get("EARLOOM_LAKE")
    place = absolute(place) if place else None
    wanted = Wanted(host or "", prefect_port or 0, mlflow_port or 0, password, place, names)
    began = time.monotonic()
    with _progress() as say:
        started = running.up(home, wanted, say)
    seen = running.look(home)
    _show(seen)
    if started.names:
        console.print(f"started {', '.join(started.names)} in {time.monotonic() - began:.0f} s", style="bold")
    else:
        console.print("all of it was running", style="bold")
    if started.without_mlflow:
        console.print(f"[yellow]without MLflow:[/] {escape(started.without_mlflow)}", soft_wrap=True)
    _show_next(home, seen)


def status(as_json: bool) -> bool:
    """Show the services and the last flow runs; returns whether all that was started runs and answers."""
    home = environment.home()
    seen = running.look(home)
    runs = _last_runs(home, seen)
    if as_json:
        print(json.dumps({"services": [_row(one) for one in seen], "flow_runs": runs}, indent=2))
    elif not seen:
        console.print("nothing is up here; `earloom up` starts Prefect, MLflow and a worker")
    else:
        _show(seen)
        _show_runs(runs)
    return all(one.state == RUNNING for one in seen)


def down(seconds: float, purge: bool) -> None:
    """End the services and say which. Raises OSError if one can not be ended."""
    home = environment.home()
    with _progress() as say:
        ended, crashed = running.down(home, seconds, say)
    for service in ended:
        console.print(f"ended {service.name} (pid {service.pid}), {service.url}")
    for name in crashed:
        console.print(f"ended the flow run {escape(name)}, which Prefect shows as crashed")
    if not ended:
        console.print("nothing was running")
    if purge:
        running.purge(home)
        console.print(f"deleted {folder()}", soft_wrap=True)


def print_environment() -> None:
    """Lines for a shell's `eval`, with the passwords: asked for by name, and to the standard output only."""
    settings = running.client_environment(environment.home())
    if not settings:
        raise RuntimeError("nothing is up here that answers: `earloom up` first")
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")


def _show(seen: list[Seen]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("service", "state", "address", "since", "pid", "log"):
        table.add_column(column, overflow="fold", no_wrap=column != "log")
    for service, state in seen:
        since = f"{datetime.fromtimestamp(service.began):%Y-%m-%d %H:%M}"
        address = _page(service.name, service.url) + (" (password)" if service.auth else "")
        row = (service.name, f"[{STYLES[state]}]{state}[/]", escape(address), since, str(service.pid))
        table.add_row(*row, escape(str(service.log)))
    console.print(table)
    for service, state in seen:
        if state != RUNNING:
            console.print(f"\n[bold]{service.name}: {state}[/]; `earloom up` brings it back. The end of its log:")
            console.print(escape(processes.tail(service.log, 6)), style="dim", soft_wrap=True)


def _show_runs(runs: list[dict[str, Any]]) -> None:
    if not runs:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for column in ("last flow runs", "state", "began", "seconds"):
        table.add_column(column)
    for run in runs:
        style = RUN_STYLES.get(run["type"], "default")
        began = f"{datetime.fromisoformat(run['began']).astimezone():%Y-%m-%d %H:%M:%S}" if run["began"] else "–"
        table.add_row(escape(run["name"]), f"[{style}]{escape(run['state'])}[/]", began, f"{run['seconds']:.0f}")
    console.print()
    console.print(table)


def _show_next(home: Path, seen: list[Seen]) -> None:
    """The settings for a shell, without a password, and a warning where others can reach a server."""
    words = [f"{name}={shlex.quote(value)}" for name, value in running.client_environment(home, secret=False).items()]
    console.print(f"\nfor a shell:  export {escape(' '.join(words))}", soft_wrap=True)
    if any(service.auth for service, _ in seen):
        console.print(
            f'with the password:  eval "$(earloom status --env)"   (kept in {folder() / "auth"})', soft_wrap=True
        )
    for service, _ in seen:
        if service.name != "worker" and not processes.is_loopback(service.host):
            console.print(
                f"[yellow]{service.name} is open to others on {service.host}, without encryption:[/] "
                "put a TLS proxy before it (docs/team.md)",
                soft_wrap=True,
            )


def _last_runs(home: Path, seen: list[Seen]) -> list[dict[str, Any]]:
    """The flow runs that began last, newest first; none if Prefect does not answer."""
    api = next((service.url for service, state in seen if service.name == "prefect" and state == RUNNING), None)
    if api is None:
        return []
    try:
        return flow_runs.last(api, running.auth_in_force(home), LAST_RUNS)
    except OSError:
        return []


def _row(seen: Seen) -> dict[str, Any]:
    service = seen.service
    return {
        "service": service.name,
        "state": seen.state,
        "address": service.url,
        "since": datetime.fromtimestamp(service.began, UTC).isoformat(timespec="seconds"),
        "pid": service.pid,
        "log": str(service.log),
        "authentication": service.auth,
    }


def _page(name: str, url: str) -> str:
    """What a person opens: Prefect's pages lie above its API."""
    return f"asks {url}" if name == "worker" else url.removesuffix("/api")


@contextmanager
def _progress() -> Iterator[running.Say]:
    """What is waited for and how long already, on a terminal; one line each elsewhere."""
    if not console.is_terminal:
        yield lambda text: console.print(f"  {text} …")
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task("services", total=None)
        yield lambda text: bar.update(row, description=text)
