"""Processes that go on when we are gone: started in a session of their own, known again by pid and time of start.

A pid alone is not enough: the kernel gives it to somebody else once its process is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path

MARK = "EARLOOM_SERVICES"  # in the environment of all that we start: the folder it belongs to
IP = (socket.AF_INET, socket.AF_INET6)
LOG_BYTES = 16 << 20
SAME_START = 1.0  # seconds by which two readings of a start may differ
_children: dict[int, subprocess.Popen[bytes]] = {}  # of this process: reaped by us, else they stay as zombies


def launch(command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> tuple[int, float]:
    """Start a command detached, in `folder`, with its output at the end of `log`; returns pid and time of start.

    The log is readable by its owner only; a long one is put aside first. Raises OSError if the program is not there.
    """
    if log.is_file() and log.stat().st_size > LOG_BYTES:
        os.replace(log, log.with_suffix(".old.log"))
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        os.fchmod(output.fileno(), 0o600)
        process = subprocess.Popen(
            command,
            env={**environment, MARK: str(log.parent)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _children[process.pid] = process
    return process.pid, began(process.pid) or time.time()


def began(pid: int) -> float | None:
    """When the process with this pid started, in seconds since 1970; None if there is none, or only a zombie."""
    import psutil

    if pid in _children:
        _children[pid].poll()
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def alive(pid: int, start: float) -> bool:
    """Whether the very process runs that started then; another one with its pid does not count."""
    now = began(pid)
    return now is not None and abs(now - start) < SAME_START


def end(pid: int, start: float, seconds: float, folder: Path) -> set[int]:
    """End a process that `launch` started and all that it left behind; returns the pids of what was ended.

    The process itself is asked first, so that it can close down in order, then its children; each time, what has not
    ended after `seconds` is killed. Only a process with this start is touched, and of its session only what carries
    the mark of `folder`.
    """
    ours = _members(pid, start, folder)
    leader = [process for process in ours if process.pid == pid]
    _signal(leader, "terminate")
    _wait(leader, seconds)
    late = {process.pid: process for process in [*ours, *_members(pid, start, folder)]}
    left = [process for process in late.values() if _lives(process)]
    _signal([process for process in left if process.pid != pid], "terminate")
    _wait(left, seconds if any(process.pid != pid for process in left) else 0.0)
    _signal(left, "kill")
    _wait(left, 5.0)
    return set(late)


def members(pid: int, start: float, folder: Path) -> set[int]:
    """Pids of a process that `launch` started and of all that `end` would end with it."""
    return {process.pid for process in _members(pid, start, folder)}


def sweep(folder: Path, spare: Set[int] = frozenset()) -> set[int]:
    """End all but `spare` that carries the mark of `folder`, such as flow runs whose worker is gone; returns pids."""
    import psutil

    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if (
                process.pid not in {os.getpid(), *spare}
                and process.environ().get(MARK) == str(folder)
                and _lives(process)
            ):
                left.append(process)
    _signal(left, "terminate")
    _wait(left, 5.0)
    _signal(left, "kill")
    _wait(left, 5.0)
    return {process.pid for process in left}


def _members(pid: int, start: float, folder: Path) -> list:  # type: ignore[type-arg]
    """The process, its descendants, and what else is in its session: flow runs outlive a killed worker."""
    import psutil

    found = {}
    now = began(pid)
    if now is not None and abs(now - start) >= SAME_START:
        return []  # somebody else's: its session is too
    if now is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(pid)
            found = {process.pid: process for process in [leader, *leader.children(recursive=True)]}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if os.getsid(process.pid) == pid and process.environ().get(MARK) == str(folder):
                found.setdefault(process.pid, process)
    return list(found.values())


def _signal(processes: Sequence, what: str) -> None:  # type: ignore[type-arg]
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            getattr(process, what)()  # psutil looks at the start again before it signals


def _wait(processes: Sequence, seconds: float) -> None:  # type: ignore[type-arg]
    deadline = time.monotonic() + seconds
    while any(_lives(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _lives(process) -> bool:  # type: ignore[no-untyped-def]
    return began(process.pid) is not None and process.is_running()


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log; empty if there is none."""
    if not log.is_file():
        return ""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        told = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(told[-lines:])


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def taken(host: str, port: int) -> bool:
    """Whether a server can not be bound there because somebody listens already."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def listener(port: int) -> str:
    """Who listens on a port, for a person: "python (pid 12, of ann)"; "another process" if we may not know."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"{process.name()} (pid {process.pid}, of {process.username()})"
    return "another process"


def addresses() -> list[str]:
    """The addresses of this machine that others may reach."""
    import psutil

    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in IP]
    return sorted(address for address in found if "%" not in address and not is_loopback(address))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound there. A name counts by all addresses that it has."""
    try:
        addresses = [host] if _is_address(host) else [str(a[4][0]) for a in socket.getaddrinfo(host, None)]
    except OSError as error:
        raise ValueError(f"no such host: {host} ({error}); give an address of this machine") from None
    return all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, in one step: a reader sees the old one or the new one."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Only one process at a time goes on from here; `waiting` is called if that is another one.

    The lock goes with the process that holds it.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
