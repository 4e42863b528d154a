"""Quiet, private and local by default: what Ray, Prefect, Hugging Face and MLflow read from the environment.

`prepare` must run before any of them is imported. A person's own settings win.
"""

from __future__ import annotations

import os
from pathlib import Path

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # for the head that we start on loopback; a cluster's users set `token`
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # at 15, one of a product's two threads waits for whatever runs, and the other for it
    "RAY_task_oom_retries": "2",  # Ray would kill what is too large and begin it again for ever
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; at 180 the automation of `deploy` takes us for dead
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}


def prepare() -> None:
    """Set what is not set yet."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def home() -> Path:
    """`$EARLOOM_HOME`, by default `~/.cache/earloom`: what this machine keeps, whatever the lake."""
    given = os.environ.get("EARLOOM_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "earloom"


def default_lake() -> str:
    return os.environ.get("EARLOOM_LAKE", "./lake")
