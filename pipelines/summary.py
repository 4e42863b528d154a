"""What a person sees when a run has ended: the stages, the metric, some answers, the model and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from components.schema import StageReport
from infra import storage
from pipelines.config import RunConfig
from pipelines.progress import console
from pipelines.workspace import workspace

STYLES = {"done": "green", "resumed": "yellow", "up to date": "dim"}


def show_stages(reports: Sequence[StageReport], seconds: float | None = None) -> None:
    """One line a stage: what was done, what was there already, how long it took."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "state"):
        table.add_column(column)
    for column in ("done", "there", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for report in reports:
        state = f"[{STYLES[report.state]}]{report.state}[/]"
        table.add_row(
            report.stage,
            state,
            f"{report.done} {report.unit}",
            str(report.reused),
            f"{report.seconds:.1f}",
            escape(report.note),
        )
    console.print()
    console.print(table)
    if seconds is not None:
        console.print(
            f"{'all up to date' if all(r.state == 'up to date' for r in reports) else 'finished'} in {seconds:.0f} s",
            style="bold",
        )


def show_run(config: RunConfig, report_url: str, clip: str) -> None:
    """Metric before and after, five answers, the registered version, the report and a command to try."""
    from components.evaluation.examples import choose
    from components.evaluation.metrics import main_metric
    from pipelines.evaluate import read_hypotheses, read_scores
    from pipelines.register import REGISTERED

    work = workspace(config)
    scores, before = read_scores(work)
    name, value, _ = main_metric(scores)
    was = f"untrained {main_metric(before)[1]:.1%} → " if before else ""
    console.print(f"\n[bold]{name}[/bold]  {was}[bold green]{value:.1%}[/]")
    for answer in choose(read_hypotheses(work), 5):
        console.print(
            f"  said  {escape(answer.reference)}\n  heard [cyan]{escape(answer.hypothesis or '(nothing)')}[/]",
            style="default",
        )
    registered = storage.read_json(storage.join(work.run_root, REGISTERED))
    model = f"{registered['name']}@{registered['alias']}"
    console.print(
        f"\nmodel   [bold]{registered['name']}[/bold] version {registered['version']}, alias {registered['alias']}",
        soft_wrap=True,
    )
    console.print(f"report  {report_url}", soft_wrap=True)
    given = RunConfig(arch=config.arch, data=config.data).lake != config.lake
    lake = f" --lake {shlex.quote(config.lake)}" if given else ""
    console.print(f"try     earloom listen {model} {shlex.quote(clip)}{lake}", soft_wrap=True)
