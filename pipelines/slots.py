"""Who may train now: a place in Prefect's limit `earloom-training`, so that two trainings do not share a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines import server

TRAINING = "earloom-training"
LEASE_SECONDS = 90.0  # a process that died without a word keeps its place for no longer than this


@contextmanager
def training_slot() -> Iterator[None]:
    """Hold a place while training; wait for it where others have taken all.

    `earloom deploy` makes the limit; without it, or with Prefect's temporary server, nobody waits. The place is a lease
    that is renewed while the process lives. A server that is away for a moment must not end a training.
    """
    from prefect.concurrency.sync import concurrency
    from prefect.context import FlowRunContext
    from prefect.settings import PREFECT_API_URL

    if server.temporary() or not PREFECT_API_URL.value() or FlowRunContext.get() is None:
        yield
        return
    with concurrency(TRAINING, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        yield
