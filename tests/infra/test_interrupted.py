"""A process that works with a Ray of its own is ended, kindly or not: nothing of that Ray is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import signal, time
from infra.environment import prepare
prepare()
from infra import cluster

class Ended(BaseException):
    pass

def end(number, frame):
    raise Ended

signal.signal(signal.SIGTERM, end)

def wait_for_ray():
    ray = cluster.connect("local", 1)
    slow = ray.remote(lambda: time.sleep(300)).remote()
    print("works", flush=True)
    return ray.get(slow)

try:
    cluster.interruptibly(wait_for_ray)
except Ended:
    print("heard", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_ray_outlives_us(number: signal.Signals) -> None:
    """As Prefect does it: the signal goes to the whole group. SIGTERM is heard although Ray is being waited for."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    started: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        time.sleep(2)  # the task's own process
        started = psutil.Process(process.pid).children(recursive=True)
        commands = [" ".join(one.cmdline()) for one in started]
        assert any("raylet" in command for command in commands)
        assert any("infra/ray_agent.py" in command for command in commands)  # in the place of Ray's own
        assert not any("ray::DashboardAgent" in command for command in commands)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=25)
        assert output == ("heard\n" if number == signal.SIGTERM else "")
        assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        _, alive = psutil.wait_procs(started, timeout=20)
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        process.kill()
        for one in started:
            if one.is_running():
                one.kill()
