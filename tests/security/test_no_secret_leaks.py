"""No secret in anything that a run leaves: outputs, lake, registry, Prefect's and Ray's records, command lines.

The chain runs with distinctive secrets in its environment, and fails with them, and every byte is searched. Meanwhile
it is watched what listens, and where.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from infra.processes import free_port
from tests.security.planted import ENVIRONMENT, SECRETS, found_below, found_in
from tests.security.ports import Listener, exposed, listening

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ("preset=tiny", "per_shard=16", "eval_clips=4", "baseline_clips=1", "name=safe", "dataset=spoken")
STEPS = ("recipe.stages.adaptor.max_steps=2", "recipe.stages.lora.max_steps=2")


@dataclass
class Ran:
    """What one command said, and what was seen of its processes."""

    code: int
    output: str
    doors: set[Listener] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)


@dataclass
class Team:
    """Servers and folders of the test; `runs` by name."""

    home: Path
    data: Path
    environment: dict[str, str]
    prefect: str
    runs: dict[str, Ran] = field(default_factory=dict)

    def earloom(self, *words: str, **more: str) -> Ran:
        """A command as a person starts it, watched until it ends."""
        ran = Ran(-1, "")
        with tempfile.TemporaryFile(dir=self.home) as said:
            command = [sys.executable, "-m", "pipelines.cli", *words]
            process = subprocess.Popen(
                command, env=self.environment | more, cwd=self.home, stdout=said, stderr=said, start_new_session=True
            )
            over = threading.Event()
            watcher = threading.Thread(target=_watch, args=(process.pid, ran, over))
            watcher.start()
            try:
                ran.code = process.wait(600)
            finally:
                over.set()
                watcher.join()
                _end(process.pid)
            said.seek(0)
            ran.output = said.read().decode(errors="replace")
        return ran


def _watch(pid: int, ran: Ran, over: threading.Event) -> None:
    while not over.wait(0.4):
        ran.doors |= set(listening(pid))
        for process in psutil.process_iter(["cmdline", "pid"]):
            ran.commands.add("\0".join(process.info["cmdline"] or []))


def _end(session: int) -> None:
    """End what is left of a command's session."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                process.send_signal(signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


@pytest.fixture(scope="module")
def team(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A bucket, a Prefect server with a login, a corpus, and an environment full of secrets."""
    from components.corpus.speak import speak_corpus

    home = Path(tempfile.mkdtemp(prefix="el-", dir="/tmp"))  # short: Ray's sockets lie in it, whose paths are limited
    data = tmp_path_factory.mktemp("spoken")
    speak_corpus(data, 40)
    port = free_port()
    ours = {"HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "RAY_TMPDIR": str(home / "ray")}
    ours |= {"PYTHONPATH": str(REPOSITORY), "EARLOOM_LAKE": f"{bucket}/lake", "PREFECT_LOGGING_LEVEL": "INFO"}
    ours |= {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    ours |= {"AWS_DEFAULT_REGION": "us-east-1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    ours |= {"HF_HUB_OFFLINE": "1", **ENVIRONMENT}
    serving = ours | {"PREFECT_SERVER_API_AUTH_STRING": SECRETS["Prefect login"], "PREFECT_HOME": str(home / "server")}
    (home / "server").mkdir()
    (home / "ray").mkdir()
    with open(home / "server" / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start"],
            env=serving | {"PREFECT_SERVER_API_PORT": str(port), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait_for(url, server)
        yield Team(home, data, ours, url)
    finally:
        server.terminate()
        server.wait(30)
        _end(server.pid)
        shutil.rmtree(home, ignore_errors=True)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except OSError:
            assert server.poll() is None
            time.sleep(0.5)
    raise AssertionError("the Prefect server never answered")


@pytest.fixture(scope="module")
def after(team: Team) -> Team:
    """One run that succeeds, and one for each way to fail with a secret at hand."""
    import boto3

    one = ("--arch", "funasr_llm", "--data", str(team.data), *WORDS, *STEPS)
    server = {"PREFECT_API_URL": team.prefect}
    login = f"{SECRETS['MLflow user']}:{SECRETS['MLflow password']}"
    team.runs["whole"] = team.earloom("run", *one, **server)
    team.runs["no MLflow"] = team.earloom(
        "register", *one, MLFLOW_TRACKING_URI=f"http://{login}@127.0.0.1:9/mlflow", **server
    )
    wrong = tuple(word for word in one if not word.startswith("recipe"))
    team.runs["no bucket"] = team.earloom("ingest", *wrong, "--lake", "s3://nowhere/lake", **server)
    signed = f"https://nobody.invalid/x.tar?X-Amz-Signature={SECRETS['signature']}"
    team.runs["signed"] = team.earloom("ingest", "--arch", "funasr_llm", "--data", signed, **server)
    # A worker that fails far from here: the weights that it is to read are gone. This one has a temporary API.
    s3 = boto3.client("s3")
    for item in s3.list_objects_v2(Bucket="lake", Prefix="lake/runs")["Contents"]:
        if item["Key"].endswith("weights.safetensors"):
            s3.delete_object(Bucket="lake", Key=item["Key"])
    team.runs["worker"] = team.earloom("evaluate", *one, "split=dev")
    return team


def test_the_runs_end_as_they_should(after: Team) -> None:
    codes = {name: ran.code for name, ran in after.runs.items()}
    said = "\n".join(f"== {name}\n{ran.output[-1500:]}" for name, ran in after.runs.items())
    assert codes == {"whole": 0, "no MLflow": 1, "no bucket": 1, "signed": 1, "worker": 1}, said
    assert "safe version 1 @candidate" in after.runs["whole"].output
    assert "MLflow at http://***@127.0.0.1:9/mlflow" in after.runs["no MLflow"].output
    assert "s3://nowhere/lake" in after.runs["no bucket"].output
    assert "https://nobody.invalid/x.tar?***" in after.runs["signed"].output
    assert "weights.safetensors" in after.runs["worker"].output


@pytest.mark.parametrize("name", ["whole", "no MLflow", "no bucket", "signed", "worker"])
def test_no_secret_is_printed_or_on_a_command_line(after: Team, name: str) -> None:
    ran = after.runs[name]
    assert found_in("output", ran.output.encode()) == []
    allowed = SECRETS["signature"] if name == "signed" else "\0"  # the person's own word, which was refused
    commands = "\n".join(command for command in ran.commands if allowed not in command)
    assert found_in("command lines", commands.encode()) == []


def test_no_secret_is_in_the_lake(after: Team) -> None:
    import boto3

    s3, leaks, count = boto3.client("s3"), [], 0
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="lake"):
        for item in page.get("Contents", []):
            reply = s3.get_object(Bucket="lake", Key=item["Key"])
            leaks += found_in(item["Key"], reply["Body"].read())
            leaks += found_in(item["Key"], repr((item["Key"], reply["Metadata"])).encode())
            count += 1
    assert leaks == []
    assert count > 30


def test_no_secret_is_in_the_records_of_mlflow_prefect_and_ray(after: Team) -> None:
    leaks, count = found_below(after.home)
    assert leaks == []
    for must in ("mlflow.db", "server/prefect.db", "prefect/prefect.db"):
        assert (after.home / must).stat().st_size > 50_000, must
    logs = [path for path in (after.home / "ray").rglob("*") if path.is_file() and "logs" in path.parts]
    assert len(logs) > 10
    assert count > 30


def test_the_search_finds_what_is_there(after: Team, tmp_path: Path) -> None:
    """What was searched holds the run's own words, so a secret beside them would have been found."""
    written = b"".join(path.read_bytes() for path in sorted((after.home / "server").glob("prefect.db*")))
    assert str(after.data).encode() in written
    (tmp_path / "x").write_bytes(b"..." + SECRETS["Ray token"].encode())
    assert found_below(tmp_path) == ([f"{tmp_path}/x: Ray token"], 1)


def test_nothing_listens_where_the_network_can_reach_it(after: Team) -> None:
    doors = after.runs["whole"].doors | after.runs["worker"].doors
    assert {"gcs_server", "raylet"} <= {door.process for door in doors}
    assert exposed(sorted(doors)) == []
