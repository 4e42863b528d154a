"""Training as a Ray job on a cluster of two nodes with a token: cancelled, then submitted anew, its flow killed, and
found again by the next one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from infra.jobs import Job, Jobs, follow
from pipelines import remote
from pipelines.config import RunConfig
from tests.pipelines.conftest import REPOSITORY, earloom, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKEN = "only-for-this-test-" + "0" * 32
STEPS = 30
SETTINGS = ("preset=tiny", "per_shard=8", "dataset=job", "workers=1", "cpus=1")
LONG = (f"lora.max_steps={STEPS}", "lora.epochs=100", "lora.checkpoint_every=5")


@dataclass
class Place:
    """The cluster, and the lake that flow and nodes share."""

    address: str
    home: Path  # of the nodes: a/ is the head's
    lake: Path
    corpus: Path

    @property
    def words(self) -> tuple[str, ...]:
        more = (*SETTINGS, f"ray_address={self.address}", *(f"recipe.stages.{setting}" for setting in LONG))
        return ("train", "--arch", "funasr_llm", "--data", str(self.corpus), *more)

    def flow(self, server: str) -> subprocess.Popen[str]:
        return earloom(*self.words, lake=self.lake, server=server, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)

    def jobs(self) -> list[Job]:
        return sorted(Jobs(self.address).find("earloom-"), key=lambda job: job.id)

    def checkpoints(self) -> set[str]:
        found = self.lake.glob("runs/*/stages/2-lora-*/checkpoints/step-*/state.json")
        return {path.parent.name for path in found}


def ports(count: int) -> list[int]:
    free = [socket.socket() for _ in range(count)]
    try:
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in free]
    finally:
        for one in free:
            one.close()


def ray_start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """`ray start` in the foreground, on loopback; each node has its own folder, as nodes have their own disks."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    small = ("--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}")
    with open(folder.with_suffix(".log"), "wb") as log:
        command = ["ray", "start", "--block", *small, *words]
        return subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """A node and all that it started."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(tree, timeout=10)
    for one in left:
        if one.is_running():
            one.kill()
    psutil.wait_procs(left, timeout=5)
    process.wait()


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    lake = tmp_path_factory.mktemp("as-job") / "lake"
    ingested(corpus, lake)
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie below it
    port, dashboard, client, agent, second = ports(5)
    nodes = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_AUTH_TOKEN", TOKEN)
        try:
            where = (f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
            more = (f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}")
            nodes.append(ray_start(home / "a", "--head", *where, *more))
            address = f"http://127.0.0.1:{dashboard}"
            answers(address, nodes[0], home / "a.log")
            nodes.append(
                ray_start(home / "b", f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={second}")
            )
            assert len(alive(address)) == 2
            yield Place(address, home, lake, corpus)
        finally:
            for node in reversed(nodes):
                end(node)
            shutil.rmtree(home, ignore_errors=True)


def ingested(corpus: Path, lake: Path) -> None:
    """Shards and features, made in this process."""
    from pipelines.cache import cache_features
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    def over(_, setup, arguments, items, gpus=False):  # type: ignore[no-untyped-def]
        work = setup(*arguments)
        return ((item, work(item)) for item in items)

    settings = RunConfig(arch="funasr_llm", data=str(corpus), lake=str(lake), preset="tiny", per_shard=8, dataset="job")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "over_shards", over)
        assert ingest_audio.fn(Workspace(settings)).done == 5
        assert cache_features.fn(Workspace(settings)).done == 5


def asked(url: str, value: object = None) -> object:
    """JSON of a server, with the cluster's token."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(value).encode() if value else None, headers)
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def answers(address: str, node: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            asked(f"{address}/api/version")
            return
        except OSError:
            assert node.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.3)


def alive(address: str) -> list[dict[str, object]]:
    """Nodes, once there are two of them."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = asked(f"{address}/nodes?view=summary")["data"]["summary"]  # type: ignore[index]
        living = [node for node in found if node["raylet"].get("state") == "ALIVE"]
        if len(living) == 2:
            return living
        time.sleep(0.5)
    raise AssertionError("the second node never joined")


def until(words: str, process: subprocess.Popen[str]) -> str:
    """What a flow has written up to the line with these words."""
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        assert process.stdout is not None
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def drivers(name: str) -> list[psutil.Process]:
    """Processes of a job's entry point that still run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if name in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@contextmanager
def frozen() -> Iterator[None]:
    """The training worker of our cluster does nothing meanwhile: else the job might end before it is looked for."""
    held = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                held += [process] * (process.environ().get("RAY_AUTH_TOKEN") == TOKEN)
    assert len(held) == 1
    held[0].suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            held[0].resume()


def log_of_runs(server: str) -> list[str]:
    """What Prefect has of the logs of its runs, the latest 200 lines."""
    found = asked(f"{server}/logs/filter", {"limit": 200, "sort": "TIMESTAMP_DESC"})
    return [line["message"] for line in found]  # type: ignore[attr-defined]


def test_without_the_token_nothing_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, words in ((None, "asks for a token"), ("another" * 6, "does not take this token")):
        monkeypatch.delenv("RAY_AUTH_TOKEN") if value is None else monkeypatch.setenv("RAY_AUTH_TOKEN", value)
        with pytest.raises(PermissionError, match=words):
            Jobs(place.address).find("")


def test_of_two_that_submit_at_once_one_starts_the_job(place: Place) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: Jobs(place.address).submit("race-1", "echo once", {}), range(2)))
    assert sorted(made) == [False, True]
    lines: list[str] = []
    ended, _ = follow(Jobs(place.address), "race-1", lines.append)
    assert ended.status == "SUCCEEDED" and "".join(lines).splitlines().count("once") == 1


def test_a_cancelled_flow_stops_its_job(place: Place, prefect_url: str) -> None:
    process = place.flow(prefect_url)
    wait_for(process, lambda: bool(place.checkpoints()))
    with frozen():
        (job,) = place.jobs()
        assert job.status == "RUNNING" and job.id.startswith("earloom-train-") and job.id.endswith("-1")
        assert drivers(job.id)
        process.terminate()
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"the job {job.id} is stopped" in output
    (job,) = place.jobs()
    assert job.status == "STOPPED"
    assert not drivers(job.id)


def test_a_killed_flow_finds_its_job_again(place: Place, prefect_url: str) -> None:
    before = place.checkpoints()
    process = place.flow(prefect_url)
    wait_for(process, lambda: bool(place.checkpoints() - before))
    with frozen():
        process.kill()
        first, _ = process.communicate(timeout=60)
        (name,) = {job.id for job in place.jobs() if job.status == "RUNNING"}
        assert name.endswith("-2")  # another attempt: the first one was stopped
        process = place.flow(prefect_url)
        output = until("attached to", process)
    output += process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"attached to the job {name} (running); it was not started twice" in output
    assert [job.status for job in place.jobs()] == ["STOPPED", "SUCCEEDED"]

    shown = [line for line in output.splitlines() if line.startswith("  | ")]
    assert any("lora: " in line and f"/{STEPS} steps" in line for line in shown)
    assert not any("Running entrypoint" in line for line in shown)  # that was shown by the flow that was killed
    assert "Running entrypoint" in first and TOKEN not in first + output
    logged = log_of_runs(prefect_url)
    assert any(f"attached to the job {name}" in line for line in logged)
    assert any("lora: " in line for line in logged)

    (manifest,) = place.lake.glob("runs/*/stages/2-lora-*/manifest.json")
    (metrics,) = place.lake.glob("runs/*/stages/2-lora-*/metrics.jsonl")
    assert json.loads(manifest.read_text())["steps"] == STEPS
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(STEPS))
    results = json.loads((place.lake / "jobs" / name / "results.json").read_text())
    assert [report["state"] for report in results["reports"]] == ["up to date", "resumed"]

    process = place.flow(prefect_url)  # and once more: nothing is submitted for what is there
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"done by the job {name}" in output and output.count("up to date") == 2
    assert len(place.jobs()) == 2


def test_what_is_sent_is_the_code_of_this_checkout(place: Place) -> None:
    found = place.home.glob("a/session_2*/runtime_resources/*/*/pipelines/job_main.py")
    sent = max({path.parents[1] for path in found}, key=lambda folder: folder.stat().st_mtime)  # of the last job
    assert sorted(path.name for path in sent.iterdir()) == ["components", "infra", "models", "pipelines"]
    assert (sent / "pipelines" / "jobs.py").read_bytes() == (REPOSITORY / "pipelines" / "jobs.py").read_bytes()
