"""A small spoken corpus, a lake, and a real Prefect server on loopback, started once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.environment import prepare
from infra.processes import free_port

prepare()
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from components.corpus.speak import speak_corpus

    folder = tmp_path_factory.mktemp("corpus")
    speak_corpus(folder, 40)
    return folder


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prefect server of our own."""
    port = free_port()
    home = tmp_path_factory.mktemp("prefect")
    environment = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": str(port)}
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start"], env=environment, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()[-2000:]
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def with_server(prefect_url: str) -> Iterator[str]:
    """Flows of this process talk to the server. They send no heartbeats: each would wait a second for its last one."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield prefect_url


def earloom(*words: str, lake: Path, server: str | None = None, **extra: str) -> subprocess.Popen[str]:
    """The command line as a person starts it, in a session of its own."""
    environment = os.environ | {"EARLOOM_LAKE": str(lake), "PYTHONPATH": str(REPOSITORY)} | extra
    if server:
        environment["PREFECT_API_URL"] = server
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        env=environment,
        cwd=lake.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Return as soon as `ready()`; AssertionError if the process has ended before, or five minutes have passed."""
    began = time.monotonic()
    while not ready():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() - began < 300, "the process never got to the point where it is killed"
        time.sleep(0.005)


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """sha256 of the files below a folder, by their path in it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))
    }
