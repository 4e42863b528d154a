"""What a process and its children listen on, and whether somebody on the network can reach it."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

import psutil


class Listener(NamedTuple):
    """An open door: address, port, and who holds it."""

    address: str
    port: int
    process: str


def listening(pid: int) -> list[Listener]:
    """TCP ports on which a process, its children and theirs listen, sorted. One that has ended is left out."""
    found = set()
    for process in _tree(pid):
        try:
            name, connections = process.name(), process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        found |= {Listener(c.laddr.ip, c.laddr.port, name) for c in connections if c.status == psutil.CONN_LISTEN}
    return sorted(found)


def exposed(listeners: list[Listener]) -> list[Listener]:
    """Those that can be reached from another machine: on any address, or on one that is not loopback."""
    return [door for door in listeners if not is_loopback(door.address)]


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)  # gRPC binds to ::ffff:127.0.0.1
    return (mapped or parsed).is_loopback


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
