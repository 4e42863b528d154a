"""The Prefect server of one command: on loopback only, ends with whoever started it, says why it could not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra import temporary_prefect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import time
from infra import temporary_prefect
server = temporary_prefect.start()
print(server.process.pid, server.url, flush=True)
time.sleep(100)
"""


def test_it_listens_on_loopback_and_ends_when_we_are_killed(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        pid, url = program.stdout.readline().split()
        server = psutil.Process(int(pid))
        listening = [one.laddr for one in server.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        assert [f"http://{place.ip}:{place.port}/api" for place in listening] == [url]
        os.kill(program.pid, signal.SIGKILL)
        server.wait(temporary_prefect.END_SECONDS + 20)
    finally:
        program.kill()
        program.wait()


def test_one_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////nowhere/at/all.db")
    server = temporary_prefect.start()
    with pytest.raises(RuntimeError, match=r"did not start; name one in PREFECT_API_URL\n(.|\n)*unable to open"):
        temporary_prefect.wait_for(server)
    assert server.process.poll() is not None
