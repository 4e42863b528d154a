"""tests/security/ports.py sees what listens; infra/loopback.py sets what it says and takes it back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from infra import loopback
from tests.security.ports import Listener, exposed, is_loopback, listening


def test_what_a_process_and_its_children_listen_on() -> None:
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        theirs = int(child.stdout.readline())
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = server.getsockname()[1]
            assert {(door.address, door.port) for door in listening(os.getpid())} >= {
                ("127.0.0.1", ours),
                ("127.0.0.1", theirs),
            }
        assert ours not in {door.port for door in listening(os.getpid())}
        assert [door.port for door in listening(child.pid)] == [theirs]
    finally:
        child.kill()
        child.wait()
    assert listening(child.pid) == []


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_not_exposed(address: str) -> None:
    assert is_loopback(address)
    assert exposed([Listener(address, 1, "x")]) == []


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.7", "192.0.2.2", "::ffff:10.0.0.7", "fe80::1%eth0"])
def test_everything_else_is(address: str) -> None:
    assert exposed([Listener(address, 1, "x")]) == [Listener(address, 1, "x")]


@pytest.mark.slow
def test_ray_s_switch_is_set_only_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, services

    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    with loopback.only():
        assert services.get_node_ip_address() == "127.0.0.1"
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "eth7")
    assert (dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER) == before
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # a person wants it otherwise
    with loopback.only():
        assert before[1] == ray_constants.ENABLE_RAY_CLUSTER
