"""A Prefect server for one command, where nobody has one: it listens on loopback only, and ends when we do.

Prefect can start one by itself, but imports all of its server for that into the process that asks, and leaves a server
behind if that process is killed. This one is started before anything is imported: it is ready when our imports are.

Source: prefect/server/api/server.py, `SubprocessASGIServer`, whose command and settings are used here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from typing import IO, NamedTuple

from infra import services

SETTINGS = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
SETTINGS |= {"PREFECT_LOGGING_LEVEL": "ERROR", "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"}  # seen only if it fails
START_SECONDS, END_SECONDS = 180.0, 5.0


class Temporary(NamedTuple):
    """A server that may not answer yet."""

    url: str
    process: subprocess.Popen[bytes]  # ends when its standard input does
    log: IO[bytes]


def start() -> Temporary:
    """Start it and return at once; connections wait until it is ready. It keeps its runs where Prefect does."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the server
    with socket.create_server((services.LOOPBACK, 0)) as listening:  # it gets the very socket: no race for a port
        handle, address = listening.fileno(), f"http://{services.LOOPBACK}:{listening.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "infra.temporary_prefect", str(handle)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(handle,),
            start_new_session=True,  # a Ctrl-C is for us; it has to hear then how our run ended
            env={**os.environ, **SETTINGS, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": address},
        )
    return Temporary(f"{address}/api", process, log)


def wait_for(server: Temporary) -> None:
    """Return when it answers; RuntimeError with the end of what it said if it ended or takes too long."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            services.get(f"{server.url}/health", seconds=max(1.0, end - time.monotonic()))
            return
        except urllib.error.HTTPError:
            time.sleep(0.1)
        except OSError:
            continue  # it ended, or time is up
    server.log.seek(0)
    said = server.log.read().decode(errors="replace").strip().splitlines()[-5:]
    raise RuntimeError("\n".join(["Prefect's temporary server did not start; name one in PREFECT_API_URL", *said]))


def _serve(handle: int) -> None:
    import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, lifespan="on", log_level="error")
    server = uvicorn.Server(config)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=handle)])


def _end_with_parent(server: object) -> None:
    """What was sent is still written down, in a few seconds at most."""
    os.read(0, 1)  # nobody writes: this returns when nobody could any more
    server.should_exit = True  # type: ignore[attr-defined]
    time.sleep(END_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
