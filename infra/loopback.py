"""A Ray that is started here listens on this machine's loopback alone: nobody on the network can reach it.

Ray runs whatever it is sent (CVE-2023-48022), and by itself it listens on every address: its own protection is a token
that the processes on this machine do without. On macOS and Windows it takes 127.0.0.1 as the node's address and then
binds to that only; the switch for it is used here.

Source: ray/_private/services.py, `get_node_ip_address`; ray/_private/ray_constants.py, `ENABLE_RAY_CLUSTER`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Set while Ray's processes are started, which hand them on to the workers.
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",  # where the processes of a training talk to each other
    "NCCL_SOCKET_IFNAME": "lo",
}


@contextmanager
def only() -> Iterator[None]:
    """`ray.init("local")` within it is for this machine only. What a person has set already is left as it is."""
    from ray._private import ray_constants

    added = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    before, named = ray_constants.ENABLE_RAY_CLUSTER, next(iter(SETTINGS))
    os.environ.update(added)
    if named in added:  # Ray has read the variable when it was imported
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        for name in added:
            os.environ.pop(name, None)
