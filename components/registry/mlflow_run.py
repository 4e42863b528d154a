"""The MLflow run behind a version: parameters, metrics, and the curves of its training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "earloom"
BATCH = 1000  # metrics in one call, MLflow's limit


def finished_run(
    client: MlflowClient,
    name: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """Id of a finished MLflow run with parameters, metrics and curves. Left alone if the version cannot be made."""
    from mlflow.entities import Metric, Param

    experiment = _experiment(client)
    run = client.create_run(experiment, run_name=name, tags=dict(tags))
    now = run.info.start_time
    rows = [Metric(metric_key(key), float(value), now, 0) for key, value in metrics.items() if _finite(value)]
    rows += [Metric(metric_key(key), value, now, step) for key, value, step in curve(history)]
    for start in range(0, len(rows), BATCH):
        client.log_batch(run.info.run_id, metrics=rows[start : start + BATCH])
    values = [Param(metric_key(key), str(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(values), 100):
        client.log_batch(run.info.run_id, params=values[start : start + 100])
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT))
        except MlflowException:  # another process may have made it in between
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return str(found.experiment_id)


def curve(history: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """(stage/field, value, step) of every finite number in the lines of metrics.jsonl; tasks become `task share`."""
    found = []
    for row in history:
        if not isinstance(row.get("step"), int):
            continue
        stage = str(row.get("stage", "train"))
        shares = row.get("tasks")
        flat = {
            **row,
            **({f"share/{task}": share for task, share in shares.items()} if isinstance(shares, dict) else {}),
        }
        found += [
            (f"{stage}/{key}", float(value), row["step"])
            for key, value in flat.items()
            if key != "step" and _finite(value)
        ]
    return found


def metric_key(name: str) -> str:
    """A name that every MLflow server takes: letters, digits, `_ - . /` and spaces, at most 250 long."""
    return re.sub(r"[^\w./ -]", "/", name).replace("//", "/").strip("/")[:250]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
