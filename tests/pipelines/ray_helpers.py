"""A Ray cluster of two nodes on loopback, with token authentication, as `ray start` makes it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

TOKEN = "only-for-this-test-" + "0" * 32


class Cluster(NamedTuple):
    """Its job address, and the folder of its nodes: a/ is the head's."""

    address: str
    home: Path


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """The cluster; within it this process knows the token. The nodes have the environment that is there now."""
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie below it
    port, dashboard, client, agent, second = ports(5)
    nodes = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN", TOKEN)
        try:
            where = (f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
            more = (f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}")
            nodes.append(ray_start(home / "a", "--head", *where, *more))
            address = f"http://127.0.0.1:{dashboard}"
            answers(address, nodes[0], home / "a.log")
            nodes.append(
                ray_start(home / "b", f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={second}")
            )
            assert len(alive(address)) == 2
            yield Cluster(address, home)
        finally:
            for node in reversed(nodes):
                end(node)
            shutil.rmtree(home, ignore_errors=True)


def ports(count: int) -> list[int]:
    free = [socket.socket() for _ in range(count)]
    try:
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in free]
    finally:
        for one in free:
            one.close()


def ray_start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """`ray start` in the foreground, on loopback; each node has its own folder, as nodes have their own disks."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    small = ("--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}")
    with open(folder.with_suffix(".log"), "wb") as log:
        command = ["ray", "start", "--block", *small, *words]
        return subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """A node and all that it started."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(tree, timeout=10)
    for one in left:
        if one.is_running():
            one.kill()
    psutil.wait_procs(left, timeout=5)
    process.wait()


def asked(url: str, value: object = None) -> object:
    """JSON of a server, with the cluster's token."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(value).encode() if value else None, headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def answers(address: str, node: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            asked(f"{address}/api/version")
            return
        except OSError:
            assert node.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.3)


def alive(address: str) -> list[dict[str, object]]:
    """Nodes, once there are two of them."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = asked(f"{address}/nodes?view=summary")["data"]["summary"]  # type: ignore[index]
        living = [node for node in found if node["raylet"].get("state") == "ALIVE"]
        if len(living) == 2:
            return living
        time.sleep(0.5)
    raise AssertionError("the second node never joined")
