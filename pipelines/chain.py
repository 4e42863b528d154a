"""The chain: ingest → cache → train → evaluate → register, as one flow of flows."""

from __future__ import annotations

import time
from typing import NamedTuple

from prefect import flow

from components.schema import StageReport
from infra import cluster
from pipelines import artifacts
from pipelines.cache import cache
from pipelines.config import RunConfig
from pipelines.evaluate import evaluate
from pipelines.ingest import ingest
from pipelines.progress import console
from pipelines.register import register, write_run_report
from pipelines.train import train
from pipelines.workspace import shared


class ChainResult(NamedTuple):
    """What a run ends with."""

    reports: list[StageReport]
    run_url: str
    report_url: str
    seconds: float


@flow(name="earloom", description="From audio to a registered speech LLM")
def chain(config: RunConfig) -> ChainResult:
    """Run every stage; what is up to date is left alone. Ray is started by the first stage that needs it."""
    began = time.monotonic()
    reports: list[StageReport] = []
    with shared(config) as work:
        try:
            _ = work.preset  # a wrong setting is said before any stage starts
            for stage in (ingest, cache, train, evaluate, register):
                console.print(f"[bold]{stage.name}[/bold]")
                made = stage.with_options(flow_run_name=stage.name)(config)  # as its bar is called on the run's page
                reports += made if isinstance(made, list) else [made]
        finally:
            cluster.disconnect()
        report = write_run_report(work, reports)
        artifacts.show_stages(reports)
        artifacts.show_run(work, report)
        return ChainResult(reports, work.run_root, report, time.monotonic() - began)
