"""Progress of long work: a bar with rate and ETA on a terminal, a line now and then elsewhere, a Prefect artifact."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SECONDS = 15.0  # between two lines where there is no terminal
ARTIFACT_SECONDS = 5.0


class RunConsole(Console):
    """A console whose lines also stand in the log of the Prefect run, where a person who started it looks for them."""

    def print(self, *objects: Any, **named: Any) -> None:
        super().print(*objects, **named)
        # Lines of a Ray job come with markup=False; `jobs` sends them there by itself.
        if named.get("markup", True) and all(isinstance(one, str) for one in objects):
            _log(" ".join(Text.from_markup(one).plain for one in objects).strip())


console = RunConsole(highlight=False, width=None if sys.stdout.isatty() else 140)


def _log(line: str) -> None:
    """In a run that a worker started; elsewhere it would stand on the terminal twice."""
    if not line or "PREFECT__FLOW_RUN_ID" not in os.environ:
        return
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    with suppress(MissingContextError):
        get_run_logger().info(line)


class Work:
    """`with Work("ingest", total, "shards") as work: work.to(done, note)`."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.began = self.last_line = time.monotonic()
        self.last_artifact = 0.0
        self.artifact: UUID | None = None
        self.bar: Progress | None = None
        self.row: TaskID | None = None

    def __enter__(self) -> Work:
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("  {task.description:<10}"),
                BarColumn(28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self.bar.start()
            self.row = self.bar.add_task(self.label, total=self.total, note=self.unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            self._publish(100.0)

    def to(self, done: int, note: str = "", total: int | None = None) -> None:
        """Say that `done` of the total is done."""
        self.total = total or self.total
        now = time.monotonic()
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=done, total=self.total, note=note or self.unit)
        elif now - self.last_line > LINE_SECONDS and done:
            rate = done / (now - self.began)
            left = (self.total - done) / rate
            pace = f"{rate:.1f}/s, ETA {left:.0f} s"
            console.print(f"  {self.label}: {done}/{self.total} {self.unit}, {pace}  {note}")
            self.last_line = now
        if now - self.last_artifact > ARTIFACT_SECONDS:
            self.last_artifact = now
            self._publish(100.0 * done / max(1, self.total))

    def _publish(self, percent: float) -> None:
        """Show the same in Prefect, where a flow is running; a server that does not answer must not stop the work."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.context import FlowRunContext
        from prefect.exceptions import PrefectException

        if FlowRunContext.get() is None:
            return
        try:
            if self.artifact is None:
                key = re.sub(r"[^a-z0-9]+", "-", f"{self.label} progress".lower())  # all that Prefect takes
                made = create_progress_artifact(progress=percent, key=key, description=f"{self.label} ({self.unit})")
                self.artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(artifact_id=self.artifact, progress=percent)
        except (OSError, RuntimeError, ValueError, PrefectException) as error:
            logging.getLogger(__name__).debug("no progress artifact: %s", error)
