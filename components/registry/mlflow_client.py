"""A client of MLflow that is quiet, ends in time, and whose errors name the place and never a password."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infra.secrets import redacted as shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["connected", "shown"]


@contextmanager
def connected(tracking_uri: str) -> Iterator[MlflowClient]:
    """A quiet client; MLflow's own errors become ConnectionError with the place, never with a password."""
    # Before the import: nothing is sent home, and a server that is down is noticed in seconds, not minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if match := re.fullmatch(r"sqlite:///(.+)", tracking_uri):
        Path(match[1]).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient  # 3 to 4 seconds, so only where it is used
    from mlflow.exceptions import MlflowException

    for logger in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    try:
        yield MlflowClient(tracking_uri, registry_uri=tracking_uri)
    except MlflowException as error:
        said = "it does not answer; is it running?" if "Max retries" in str(error) else shown(str(error))
        raise ConnectionError(f"MLflow at {shown(tracking_uri)}: {said}") from None
