"""`earloom fit-memory`: probe each stage on the machine that will train it, and keep what was found in the lake."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from components.training.fit import Fit
from infra import cluster
from pipelines import remote
from pipelines.config import RunConfig
from pipelines.locate import Workspace
from pipelines.progress import console
from pipelines.train import training_settings
from pipelines.workers.fit import probe_stages


def fit_stages(config: RunConfig, only: str | None = None) -> None:
    """Probe the stages (or one) and print what fits."""
    work = Workspace(config)
    settings = training_settings(work) | {"only": only}
    try:
        found: dict[str, dict[str, Any]] = remote.call(config, probe_stages, settings)
    finally:
        cluster.disconnect()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for column in ("tokens at a time", "of a batch of", "layout", "tokens/s", "MB a token", "fixed GB", "limit GB"):
        table.add_column(column, justify="right")
    budgets = {stage.name: stage.batch_tokens for stage, _ in work.stages}
    for name, dumped in found.items():
        fit = Fit.model_validate(dumped)
        table.add_row(
            name,
            f"{fit.micro_tokens:,}",
            f"{budgets[name]:,}",
            fit.layout,
            ", ".join(f"{form} {speed:,.0f}" for form, speed in fit.tokens_per_second.items()),
            f"{fit.bytes_per_token / 1e6:.2f}",
            f"{fit.fixed_bytes / 1e9:.2f}",
            f"{fit.limit_bytes / 1e9:.1f}",
        )
    console.print(table)
    console.print(f"kept in {work.fits}", soft_wrap=True)
