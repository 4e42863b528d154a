"""Training as a Ray job on a cluster of two nodes with a token: cancelled, then submitted anew, its flow killed, and
found again by the next one. Then the whole chain, started in Prefect, with a lake on S3."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from components.registry.mlflow_registry import find
from infra import services, storage
from infra.jobs import Job, Jobs, follow
from pipelines.config import RunConfig
from tests.direct import run_directly, without_ray
from tests.pipelines.conftest import REPOSITORY, earloom, wait_for
from tests.pipelines.prefect_helpers import Server
from tests.pipelines.ray_helpers import TOKEN, asked, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
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


@pytest.fixture(scope="module")
def place(corpus: Path, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The bucket only because the nodes are to have its keys: a cluster has its own, none are sent."""
    lake = tmp_path_factory.mktemp("as-job") / "lake"
    ingested(corpus, lake)
    with two_nodes() as cluster:
        yield Place(cluster.address, cluster.home, lake, corpus)


def ingested(corpus: Path, lake: Path) -> None:
    """Shards and features, made without the cluster."""
    from pipelines.cache import cache_features
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    settings = RunConfig(arch="funasr_llm", data=str(corpus), lake=str(lake), preset="tiny", per_shard=8, dataset="job")
    with without_ray():
        assert ingest_audio.fn(Workspace(settings)).done == 5
        assert cache_features.fn(Workspace(settings)).done == 5


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
            if "training_loop" in " ".join(process.info["cmdline"] or []):
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

    said = f"Running entrypoint for job {name}"
    assert first.count(said) + output.count(said) in (1, 2)  # up to five seconds of a log are shown twice
    assert TOKEN not in first + output
    logged = log_of_runs(prefect_url)
    assert any(f"attached to the job {name}" in line for line in logged)
    assert any(said in line for line in logged)

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


def test_one_process_and_prefect_ray_and_s3_register_the_same_weights(
    place: Place, bucket: str, tmp_path: Path
) -> None:
    """A run of a deployment on a Prefect server, each stage a job on the cluster, the lake on an S3 server; and the
    same stages called one after the other in one process, on a local disk."""
    from pipelines.deployments import Target, deploy

    filled = {"arch": "funasr_llm", "data": str(place.corpus), "preset": "tiny", "per_shard": 8, "cpus": 1}
    registry = f"sqlite:///{tmp_path}/mlflow.db"
    there = {"lake": f"{bucket}/team", "tracking_uri": registry, "ray_address": place.address, "dataset": "same"}
    started = [services.start_prefect(tmp_path / "home")]
    try:
        api = started[0].url
        with temporary_settings({PREFECT_API_URL: api}):
            assert len(list(deploy(Target(directory=str(tmp_path))))) > 6
        started.append(services.start_worker(tmp_path / "home", "earloom", api))
        server = Server(api)
        # Else each job starts a Prefect server of its own.
        run = server.start("earloom/chain", filled | there | {"ray_env": {"env_vars": {"PREFECT_API_URL": api}}})
        ended = server.ended(run)
        assert ended["state"]["name"] == "Completed", server.log(run)
    finally:
        for service in reversed(started):
            services.stop(service)
    assert {job.id.split("-")[1] for job in place.jobs()} == {"ingest", "cache", "train", "evaluate", "register"}

    reports = run_directly(RunConfig(**filled, lake=str(tmp_path / "lake"), dataset="same"))
    assert [report.stage for report in reports][-1] == "register"
    here = find("funasr_llm-same@candidate", f"sqlite:///{tmp_path}/lake/mlflow.db")
    far = find("funasr_llm-same@candidate", registry)
    assert far.url.startswith(f"{bucket}/team/")
    weights = [storage.read_bytes(storage.join(found.url, "model.safetensors")) for found in (here, far)]
    assert len(weights[0]) > 100_000
    assert weights[0] == weights[1]
