"""`earloom up`, `status` and `down` as a person types them, with a real Prefect server and worker."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from infra import processes, running, services
from infra.environment import prepare
from infra.services import Service
from pipelines.cli import app

prepare()
REPOSITORY = Path(__file__).resolve().parents[2]
FLOW = """
import subprocess, time
from prefect import flow

@flow
def slow() -> None:
    subprocess.Popen(["sleep", "600"], start_new_session=True)  # as Ray's processes are
    time.sleep(600)
"""


class Team:
    """A home of its own, ports of its own, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.home, self.folder = folder / "home", folder
        self.ports = [processes.free_port(), processes.free_port()]
        self.url = f"http://127.0.0.1:{self.ports[0]}/api"
        no_mlflow = folder / "no-mlflow"  # MLflow's own tests are in tests/infra: it takes half a minute to start
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_API")} | {
            "EARLOOM_HOME": str(self.home),
            "EARLOOM_MLFLOW": str(no_mlflow),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.environment.pop("EARLOOM_AUTH", None)
        self.flags = ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]

    def begin(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines.cli", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, cwd=self.folder, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    def __call__(self, *words: str) -> tuple[int, str]:
        process = self.begin(*words)
        out, err = process.communicate(timeout=500)
        return process.returncode, out + err

    def up(self) -> str:
        code, said = self("up", *self.flags)
        assert code == 0, said
        return said

    def states(self) -> tuple[int, dict[str, str], dict[str, int]]:
        process = self.begin("status", "--json")
        out, err = process.communicate(timeout=100)
        assert out, err
        rows: list[dict[str, Any]] = json.loads(out)["services"]
        names = {row["service"]: row["state"] for row in rows}
        return process.returncode, names, {row["service"]: row["pid"] for row in rows}


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    made = Team(tmp_path_factory.mktemp("team"))
    try:
        yield made
    finally:
        running.down(made.home)


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose services are gone."""
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path))
    place = services.folder(tmp_path)
    (place / "prefect.log").write_text("started\n\nno space left on device\n")
    gone = Service("prefect", "http://127.0.0.1:9/api", 2**22 + 1, place / "prefect.log", 0.0)
    running._write(tmp_path, {"prefect": gone}, running.DEFAULTS)
    return tmp_path


def test_status_of_nothing_and_of_what_is_gone(stale: Path) -> None:
    said = CliRunner().invoke(app, ["status"])
    assert said.exit_code == 1
    assert "prefect: not running" in said.output and "no space left on device" in said.output
    asked = CliRunner().invoke(app, ["status", "--json"])
    row = json.loads(asked.output)["services"][0]
    assert (asked.exit_code, row["state"], row["address"]) == (1, "not running", "http://127.0.0.1:9/api")
    assert CliRunner().invoke(app, ["down"]).output.split() == ["prefect", "ends", "…", "nothing", "was", "running"]
    said = CliRunner().invoke(app, ["status"])
    assert (said.exit_code, "nothing is up here" in said.output) == (0, True)


def test_purge_wants_a_yes(stale: Path) -> None:
    refused = CliRunner().invoke(app, ["down", "--purge"], input="n\n")
    assert refused.exit_code == 1 and (stale / "services" / "prefect.log").exists()
    assert CliRunner().invoke(app, ["down", "--purge", "--yes"]).exit_code == 0
    assert not (stale / "services").exists()


def test_a_public_host_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path))
    monkeypatch.delenv("EARLOOM_AUTH", raising=False)
    said = CliRunner().invoke(app, ["up", "--host", "0.0.0.0"])
    assert isinstance(said.exception, ValueError)
    assert "0.0.0.0 is open to others: only with authentication, --auth or $EARLOOM_AUTH" in str(said.exception)
    assert running.read(tmp_path) == {} and not list(tmp_path.rglob("*.log"))


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_HOME", str(tmp_path))
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port, free = mine.getsockname()[1], processes.free_port()
        words = ["up", "--prefect-port", str(free), "--mlflow-port", str(port)]
        said = CliRunner().invoke(app, words)
    assert isinstance(said.exception, OSError)
    assert f"pid {os.getpid()}" in str(said.exception) and "--mlflow-port" in str(said.exception)
    assert running.read(tmp_path) == {} and not list(tmp_path.rglob("*.log"))


@pytest.mark.slow
def test_two_at_a_time_start_one_team(team: Team) -> None:
    racing = [team.begin("up", *team.flags) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in racing]
    assert [process.returncode for process in racing] == [0, 0], said
    outputs = sorted((out for out, _ in said), key=len)
    assert sum("started prefect, worker in" in out for out in outputs) == 1
    assert sum("all of it was running" in out for out in outputs) == 1
    assert all("without MLflow: $EARLOOM_MLFLOW is" in out for out in outputs)
    assert all(f"export PREFECT_API_URL={team.url}" in out for out in outputs)
    code, states, pids = team.states()
    assert (code, states) == (0, {"prefect": "running", "worker": "running"})
    assert _ours(team) >= set(pids.values())
    assert [_is(pid, "server start") for pid in _ours(team)].count(True) == 1
    assert [_is(pid, "worker start") for pid in _ours(team)].count(True) == 1
    assert team("status", "--env") == (0, f"export PREFECT_API_URL={shlex.quote(team.url)}\n")


@pytest.mark.slow
def test_a_killed_server_is_noticed_and_brought_back(team: Team) -> None:
    """On its old port and with its database; the worker, which may watch flow runs, goes on."""
    team.up()
    services.get(f"{team.url}/variables/", None, {"name": "kept", "value": "yes"})
    _, _, before = team.states()
    os.kill(before["prefect"], signal.SIGKILL)
    assert _until(lambda: not psutil.pid_exists(before["prefect"]) or processes.began(before["prefect"]) is None)
    code, states, _ = team.states()
    assert (code, states) == (1, {"prefect": "not running", "worker": "does not answer"})
    code, said = team("up")  # without flags: as it was
    assert code == 0 and "started prefect in" in said, said
    code, states, after = team.states()
    assert (code, states) == (0, {"prefect": "running", "worker": "running"})
    assert after["worker"] == before["worker"] and after["prefect"] != before["prefect"]
    assert services.get(f"{team.url}/variables/name/kept")["value"] == "yes"


@pytest.mark.slow
def test_down_leaves_no_process_no_port_and_no_run_that_seems_to_go_on(team: Team) -> None:
    team.up()
    (team.folder / "slow_flow.py").write_text(FLOW)
    run = _start_slow_flow(team)
    assert _until(lambda: services.get(f"{team.url}/flow_runs/{run}")["state_type"] == "RUNNING", 120), run
    assert _until(lambda: any(_is(pid, "sleep 600") for pid in _ours(team)))
    ours = _ours(team)
    assert [row["state"] for row in json.loads(team("status", "--json")[1])["flow_runs"]] == ["Running"]
    code, said = team("down")
    assert code == 0, said
    assert "ended worker (pid" in said and "ended prefect (pid" in said and "which Prefect shows as crashed" in said
    assert [pid for pid in ours if processes.began(pid)] == [] and _ours(team) == set()
    assert not processes.taken("127.0.0.1", team.ports[0])
    assert team.states()[1] == {}
    with closing(sqlite3.connect(team.home / "services" / "prefect" / "prefect.db")) as kept:
        question = "select r.state_type, s.message from flow_run r join flow_run_state s on s.id = r.state_id"
        [(state, message)] = kept.execute(question).fetchall()
    assert state == "CRASHED" and "by `earloom down`" in message


def _start_slow_flow(team: Team) -> str:
    """As a deployment of the pool: registered and started over the API."""
    flow = services.get(f"{team.url}/flows/", None, {"name": "slow"})["id"]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(team.folder)}}
    asked = {"name": "slow", "flow_id": flow, "work_pool_name": "earloom", "entrypoint": "slow_flow.py:slow"}
    made = services.get(f"{team.url}/deployments/", None, asked | {"pull_steps": [step]})["id"]
    return str(services.get(f"{team.url}/deployments/{made}/create_flow_run", None, {})["id"])


def _ours(team: Team) -> set[int]:
    """Pids of all that carry the mark of this home."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(processes.MARK) == str(team.home / "services") and processes.began(process.pid):
                found.add(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def _is(pid: int, words: str) -> bool:
    try:
        return words in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


def _until(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False
