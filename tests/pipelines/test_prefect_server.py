"""The chain as a team runs it: a real Prefect server and worker, deployments, runs started as the UI starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pipelines.conftest import REPOSITORY, hashes
from tests.pipelines.prefect_helpers import Server, alive, below

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
CLIPS = 20
# Long enough to be cancelled in its middle, and a checkpoint every five steps to go on from.
SETTINGS = {
    "recipe.stages.lora.max_steps": 60,
    "recipe.stages.lora.epochs": 100,
    "recipe.stages.lora.checkpoint_every": 5,
}


class Team(NamedTuple):
    """A server, the pid of its worker, and the folder where the lakes are."""

    server: Server
    worker: int
    folder: Path
    corpus: Path

    def config(self, lake: str, **more: Any) -> dict[str, Any]:
        """What a person fills in."""
        filled = {"arch": "funasr_llm", "data": str(self.corpus), "preset": "tiny", "per_shard": 8, "cpus": 2}
        return filled | {"lake": str(self.folder / lake), "set": SETTINGS} | more


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    from components.corpus.speak import speak_corpus
    from infra import services

    folder = tmp_path_factory.mktemp("team")
    speak_corpus(folder / "corpus", CLIPS)
    started = [services.start_prefect(folder / "home")]
    try:
        url = started[0].url
        changes = deployed(url, folder)
        assert {change.how for change in changes} == {"new"}
        assert {change.how for change in deployed(url, folder)} == {"same"}
        own = {"EARLOOM_LAKE": str(folder / "default"), "PREFECT_WORKER_QUERY_SECONDS": "1"}
        started.append(services.start_worker(folder / "home", "earloom", url, environment=own))
        yield Team(Server(url), started[1].pid, folder, folder / "corpus")
    finally:
        for service in reversed(started):
            services.stop(service)


def deployed(url: str, folder: Path) -> list[Any]:
    """What `earloom deploy` does."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from pipelines.deployments import Target, deploy

    with temporary_settings({PREFECT_API_URL: url}):
        return list(deploy(Target(directory=str(folder))))


@pytest.fixture(scope="module")
def chain(team: Team) -> tuple[str, dict[str, Any]]:
    """Id and record of a run of the whole chain, started with the form."""
    run = team.server.start("earloom/chain", team.config("lake"))
    return run, team.server.ended(run)


def test_the_chain_ends_registered(team: Team, chain: tuple[str, dict[str, Any]]) -> None:
    from components.registry.mlflow_registry import find

    run, record = chain
    assert record["state"]["name"] == "Completed", team.server.log(run)
    assert set(team.server.stages(run).items()) == {
        (stage, "Completed") for stage in ("ingest", "cache", "train", "evaluate", "register")
    }
    found = find("funasr_llm-corpus@candidate", f"sqlite:///{team.folder}/lake/mlflow.db")
    assert found.version == "1"
    assert (Path(found.url) / "model.safetensors").is_file()


def test_its_page_shows_tables_curves_progress_and_links(team: Team, chain: tuple[str, dict[str, Any]]) -> None:
    shown = team.server.artifacts(chain[0])
    assert {key for key, each in shown.items() if each["type"] == "progress"} >= {
        "ingest-progress",
        "cache-progress",
        "lora-progress",
    }
    assert {each["data"] for each in shown.values() if each["type"] == "progress"} == {100.0}
    stages = json.loads(shown["stages"]["data"])
    assert [row["stage"] for row in stages] == [
        "ingest",
        "cache",
        "train adaptor",
        "train lora",
        "evaluate",
        "register",
    ]
    assert {row["state"] for row in stages} == {"done"}
    scores = {row["metric"]: row["trained"] for row in json.loads(shown["metrics"]["data"])}
    assert scores["asr/test/wer"] > 0
    assert shown["curves"]["data"].count("data:image/svg+xml;base64,") == 3  # a loss each stage, and the mixture
    assert "funasr_llm-corpus" in shown["model"]["data"]
    assert f"file://{team.folder}/lake/runs/funasr_llm/" in shown["report"]["data"]
    assert "20 clips" in json.loads(shown["ingest"]["data"])[0]["result"]


def test_one_stage_is_run_again_from_its_own_form(team: Team, chain: tuple[str, dict[str, Any]]) -> None:
    run = team.server.start("evaluate/evaluate", team.config("lake"))
    assert team.server.ended(run)["state"]["name"] == "Completed", team.server.log(run)
    assert "metrics" in team.server.artifacts(run)


HOLDS = """
import time
from infra.environment import prepare; prepare()
from prefect import flow
from pipelines.slots import training_slot

@flow
def hold():
    with training_slot():
        began = time.time()
        time.sleep(3)
        return began, time.time()

print(*hold())
"""


def test_two_trainings_wait_for_each_other(team: Team) -> None:
    """Flows of different deployments, as a chain and a lone training are; here they only hold the place."""
    environment = os.environ | {"PREFECT_API_URL": team.server.url, "PREFECT_HOME": str(team.folder / "home")}
    command = [sys.executable, "-c", HOLDS]
    both = [
        subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    spans = sorted(tuple(map(float, one.communicate(timeout=120)[0].split())) for one in both)
    assert [one.returncode for one in both] == [0, 0]
    assert spans[1][0] >= spans[0][1]


def test_wrong_values_are_said_in_words(team: Team) -> None:
    import httpx

    found = team.server.ask("/deployments/name/ingest/ingest")
    for wrong, said in (({"preset": "huge"}, "'huge' is not one of"), ({"arch": "funasr"}, "is not one of")):
        body = {"parameters": {"config": team.config("lake") | wrong}}
        answer = httpx.post(f"{team.server.url}/deployments/{found['id']}/create_flow_run", json=body, timeout=60)
        assert answer.status_code == 409
        assert said in answer.text
    run = team.server.start("ingest/ingest", team.config("lake", data=str(team.folder / "nowhere")))
    state = team.server.ended(run)["state"]
    assert state["name"] == "Failed"
    assert f"nothing to read at {team.folder}/nowhere" in state["message"]


def test_a_cancelled_run_leaves_no_process_and_nothing_half_made(team: Team, chain: tuple[str, dict[str, Any]]) -> None:
    """Cancelled in the middle of training; the next run goes on and ends with the same weights as one undisturbed."""
    lake = team.folder / "cancelled"
    before = below(team.worker)
    run = team.server.start("earloom/chain", team.config("cancelled"))
    team.server.until(lambda: any(lake.glob("runs/*/stages/2-lora-*/checkpoints/step-*/state.json")))
    mine = [each for each in below(team.worker) if each not in before]
    assert any("_Hand.once" in line for line in alive(mine))  # it trains where it made the cache
    team.server.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert team.server.ended(run, 120)["state"]["name"] == "Cancelled"
    team.server.until(lambda: not alive(mine), 30)
    assert alive([each for each in below(team.worker) if each not in before]) == []

    (stage,) = lake.glob("runs/*/stages/2-lora-*")
    assert not (stage / "manifest.json").exists()
    early = team.server.ended(team.server.start("evaluate/evaluate", team.config("cancelled")))["state"]
    assert early["name"] == "Failed"
    assert "the model is not trained with these settings" in early["message"]  # what is half made is not read
    assert not any(lake.glob("runs/*/*/registered.json"))
    for manifest in lake.rglob("manifest.json"):
        json.loads(manifest.read_text())

    again = team.server.start("earloom/chain", team.config("cancelled"))
    assert team.server.ended(again)["state"]["name"] == "Completed", team.server.log(again)
    states = {row["stage"]: row["state"] for row in json.loads(team.server.artifacts(again)["stages"]["data"])}
    assert states["ingest"] == states["cache"] == "up to date"
    assert states["train lora"] == "resumed"
    weights = [hashes(place, "runs/*/stages/*/weights.safetensors") for place in (lake, team.folder / "lake")]
    assert len(weights[0]) == 2
    assert weights[0] == weights[1]
