"""Reach a Ray cluster, or start one on this machine; never stop what was not started here."""

from __future__ import annotations

import logging
import os
from typing import Any

OBJECT_STORE_BYTES = 256 << 20  # results are URLs and manifests, never features


def connect(address: str | None, cpus: int) -> Any:
    """Connect to Ray at `address`, or start it here with `cpus` cores; does nothing if it is already connected.

    Ray's own `$RAY_ADDRESS`, which a Ray job finds set, is an address too.
    """
    import ray

    if ray.is_initialized():
        return ray
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        # Without an address Ray would take one that somebody else runs on this machine, and refuse our cores.
        ray.init("local", num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **quiet)
    return ray


def disconnect() -> None:
    """Stop Ray if it was started here, else only let go of it; nothing happens if it was never reached."""
    import sys

    if "ray" not in sys.modules:
        return
    import ray

    if ray.is_initialized():
        ray.shutdown()
