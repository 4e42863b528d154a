"""`earloom models`, `promote`, `rollback` and `export` as a person types them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from infra.processes import free_port
from pipelines.cli import app
from pipelines.promoting import registry_uri, who
from tests.registry.promotion_helpers import add_version


def said(*words: str, code: int = 0) -> str:
    done: Result = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, (done.output, done.exception)
    return " ".join(done.output.split())


@pytest.mark.parametrize("command", ["models", "promote", "rollback", "export"])
def test_every_command_has_an_example(command: str) -> None:
    assert f"Example: earloom {command}" in said(command, "--help")


def test_looking_makes_no_registry(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no registry at"):
        registry_uri(str(tmp_path / "lake"), None)
    assert not (tmp_path / "lake").exists()
    assert registry_uri("s3://bucket/lake", "http://127.0.0.1:1") == "http://127.0.0.1:1"


def test_a_remote_lake_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(LookupError, match="name an MLflow server"):
        registry_uri("s3://bucket/lake", None)


def test_who_is_the_user_on_this_host_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EARLOOM_USER", raising=False)
    assert who().endswith(f"@{socket.gethostname()}")
    monkeypatch.setenv("EARLOOM_USER", "ada")
    assert who() == "ada"


@pytest.mark.slow
def test_from_candidate_to_champion_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lake = tmp_path / "lake"
    uri = f"sqlite:///{lake}/mlflow.db"
    here = ("--lake", str(lake))
    for number, wrong in enumerate((range(16), range(8), range(7)), 1):
        add_version("talker", lake / "runs" / str(number), uri, wrong)
    told = said("promote", "talker/1", *here)
    assert "talker version 1 is @champion" in told
    assert "of the untrained model" in told
    told = said("promote", "talker/2", *here, "--margin", "0.2", "--relative", "--dry-run")
    assert "would become @champion; nothing was changed" in told
    told = said("promote", "talker/2", *here, "--why", "fewer errors")
    assert "talker version 2 is @champion, in the place of version 1" in told
    assert "5.00% against 10.00% of version 1: better by 5.00 points, 0.50 points needed" in told
    told = said("promote", "talker", *here, "--margin", "0.01", code=1)
    assert "not promoted" in told
    assert "falls short by 0.37 points" in told
    assert "paired bootstrap over 40 clips" in told
    assert "is @champion already" in said("promote", "talker/2", *here)

    rows = json.loads(said("models", "talker", *here, "--json"))
    assert [(row["version"], row["aliases"], row["value"]) for row in rows] == [
        ("3", ["candidate"], 0.04375),
        ("2", ["champion"], 0.05),
        ("1", [], 0.1),
    ]
    assert {row["data"] for row in rows} == {"talk/0123456789ab"}
    assert all(row["registered"].startswith("20") for row in rows)
    table = said("models", *here)
    assert "@champion" in table
    assert "asr/test/wer 5.00%" in table

    assert "version 1 is @champion again, in the place of version 2" in said("rollback", "talker", *here)
    assert "version 2 is @best" in said("promote", "talker/2", *here, "--to", "best")
    done = CliRunner().invoke(app, ["models", "nobody", *here])
    assert isinstance(done.exception, LookupError)
    assert "there are: talker" in str(done.exception)
    for words in (["x/../../y"], ["talker@v1"], ["talker", "--to", "latest"]):
        assert isinstance(CliRunner().invoke(app, ["promote", *words, *here]).exception, ValueError)


def answers_at(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an MLflow server of our own."""
    pytest.importorskip("flask", reason="the MLflow server is in the package mlflow, not in mlflow-skinny")
    port = free_port()
    home = tmp_path_factory.mktemp("mlflow")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{home}/mlflow.db",
        "--default-artifact-root",
        str(home / "artifacts"),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(home / "server.log", "w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        began = time.monotonic()
        while not answers_at(port):
            if started.poll() is not None:
                pytest.skip(f"no MLflow server here: {(home / 'server.log').read_text()[-300:]}")
            assert time.monotonic() - began < 180, (home / "server.log").read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(20)


@pytest.mark.slow
def test_the_same_with_an_mlflow_server(server: str, tmp_path: Path) -> None:
    here = ("--tracking-uri", server, "--lake", str(tmp_path / "lake"))
    for number, wrong in enumerate((range(16), range(8)), 1):
        add_version("talker", tmp_path / "lake" / str(number), server, wrong)
    said("promote", "talker/1", *here)
    assert "in the place of version 1" in said("promote", "talker@candidate", *here, "--why", "fewer errors")
    assert "version 1 is @champion again" in said("rollback", "talker", *here)
    assert "falls short by 5.50 points" in said("promote", "talker/1", *here, "--to", "candidate", code=1)
