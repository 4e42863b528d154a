"""The processes of a Ray that was started here end with us, however we end.

The kernel ends those that we started ourselves. The agents that Ray's own node started are told only by the node: if
that is killed together with us, they stay, without a parent and for ever. So a shell waits at the end of a pipe: it
closes when we are gone, whatever became of us.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SHELL = 'read -r _ || kill -s KILL -- "$@"'  # a line = all is well; no line any more = we are dead
_waiting: subprocess.Popen[bytes] | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What Ray starts within it gets groups of its own, as on Windows, which do not outlive this process.

    A cancelled flow's whole group gets SIGTERM. A Ray that goes at the same moment takes us down with SIGABRT, before
    anything could be put in order; so it is not in our group.
    """
    from ray._private import services

    if not sys.platform.startswith("linux"):
        yield
        return
    popen, groups = services.ConsolePopen, []

    def start(*arguments: Any, **named: Any) -> Any:
        process = popen(*arguments, process_group=0, **named)
        groups.append(process.pid)
        return process

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = popen
        _watch(groups)


def _watch(groups: list[int]) -> None:
    global _waiting
    release()
    if groups:
        command = ["/bin/sh", "-c", SHELL, "earloom-reaper", *(f"-{group}" for group in groups)]
        nowhere = subprocess.DEVNULL
        _waiting = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
        )


def release() -> None:
    """All of them have ended: nobody has to wait any more."""
    global _waiting
    if _waiting is None:
        return
    assert _waiting.stdin is not None
    with contextlib.suppress(OSError):
        _waiting.stdin.write(b"\n")
        _waiting.stdin.close()
    _waiting.wait()
    _waiting = None
