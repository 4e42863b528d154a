"""What a job is called, what is sent with it, and what a stage asks of a cluster."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from infra import cluster
from pipelines import resources
from pipelines.config import RunConfig
from pipelines.job_main import main
from pipelines.jobs import DEPENDS, HOW, ONLY_HERE, work_id
from pipelines.overrides import run_config
from pipelines.resources import Resources, StageResources
from pipelines.shipment import CHECKOUT, is_checkout, only_code, runtime_env

GIVEN: dict[str, Any] = {"arch": "funasr_llm", "data": "/data/corpus", "lake": "/lake"}


def config(**more: Any) -> RunConfig:
    return run_config(GIVEN | more)


# ---- which work is the same -----------------------------------------------------------------------------------------


def test_every_setting_is_either_what_a_stage_is_or_how_it_is_computed() -> None:
    named = [name for names in DEPENDS.values() for name in names] + list(HOW)
    assert sorted(named) == sorted(set(named)) == sorted(RunConfig.model_fields)
    assert set(HOW) >= ONLY_HERE


def test_an_id_names_the_stage_and_changes_with_the_work_only() -> None:
    one = work_id("train", config())
    assert one.startswith("earloom-train-") and len(one) == len("earloom-train-") + 16 + 1
    how = {"workers": 2, "cpus": 3, "ray_address": "http://127.0.0.1:1", "ray_env": {"env_vars": {"A": "b"}}}
    assert work_id("train", config(**how, **{"resources.train.gpus": 1})) == one
    assert work_id("train", config(alias="nightly", eval_clips=3)) == one  # matters to later stages only
    for other in ({"seed": 1}, {"data": "/data/other"}, {"lake": "/other"}, {"recipe.stages.lora.epochs": 2}):
        assert work_id("train", config(**other)) != one
    assert work_id("ingest", config(preset="tiny")) == work_id("ingest", config())  # two systems share their audio
    assert work_id("cache", config(preset="tiny")) != work_id("cache", config())
    assert work_id("register", config(alias="nightly")) != work_id("register", config())


# ---- what is sent ---------------------------------------------------------------------------------------------------


def packed(folder: Path, excludes: list[str], target: Path) -> set[str]:
    """What Ray itself would send."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as found:
        return set(found.namelist())


def test_of_a_checkout_only_the_code_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    wanted = {f"{name}/code.py" for name in ("pipelines", "components", "models", "infra")} | {"infra/data/a.yaml"}
    others = {".env", ".git/config", ".venv/x.py", "lake/a.tar", "my data/[1].wav", "pyproject.toml", "notes !.txt"}
    for name in wanted | others | {"models/__pycache__/code.pyc"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert is_checkout(folder) and not is_checkout(tmp_path)
    assert packed(folder, only_code(folder), tmp_path / "a.zip") == wanted


def test_of_another_folder_no_lake_data_or_secret_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    wanted = {"pipelines/jobs.py", "tool.py", "sub/data/kept.yaml"}
    others = {".env", "key.pem", ".git/config", ".venv/x.py", "data/a.txt", "stuff/lake/x.json", "weights.safetensors"}
    for name in wanted | others | {"recordings/a.csv", ".aws/credentials"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    places = {"lake": str(folder / "stuff" / "lake"), "data": str(folder / "recordings")}
    made = runtime_env(config(ray_working_dir=str(folder), **places), job=True)
    assert made["working_dir"] == str(folder)
    assert packed(folder, made["excludes"], tmp_path / "b.zip") == wanted


def test_the_environment_of_a_job_holds_places_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAAAAAAAAAAAAAAAAA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret-key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:planted-password@mlflow:5000")
    made = runtime_env(config(ray_env={"env_vars": {"MINE": 1}, "pip": ["jiwer"]}), job=True)
    assert made["env_vars"].items() >= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "MINE": "1"}.items()
    assert made["pip"] == ["jiwer"] and made["working_dir"] == str(CHECKOUT)
    assert "planted" not in str(made) and "AKIA" not in str(made)


def test_a_driver_that_runs_here_sends_only_what_was_asked_for(tmp_path: Path) -> None:
    assert runtime_env(config(), job=False) == {}
    assert runtime_env(config(ray_working_dir="none"), job=True).keys() <= {"env_vars"}
    assert runtime_env(config(ray_working_dir="s3://b/code.zip"), job=False) == {"working_dir": "s3://b/code.zip"}
    with pytest.raises(ValueError, match="there is no folder"):
        config(ray_working_dir=str(tmp_path / "nowhere"))


def test_inside_of_a_job_a_lake_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train", str(tmp_path / "jobs" / "earloom-train-0-1")) == 1
    assert "the lake has to be where every node reaches it" in capsys.readouterr().err


# ---- what is asked of a cluster -------------------------------------------------------------------------------------


def test_resources_are_set_by_stage_and_a_wrong_name_is_mended() -> None:
    found = config(
        **{"resources.train.accelerator": "A100", "resources.train.gpus": 2, "resources.register.job_cpus": 1}
    )
    assert found.resources.train == Resources(accelerator="A100", gpus=2)
    assert resources.of(found.resources, "register").job_cpus == 1
    assert resources.of(found.resources, "cache") == Resources()
    with pytest.raises(ValueError, match=r"did you mean 'resources\.train\.gpus'"):
        config(**{"resources.train.gpu": 1})


def test_a_stage_asks_for_its_own_resources_only_while_it_runs() -> None:
    wanted = StageResources(train=Resources(gpus=1))
    assert resources.asked(wanted) == Resources()
    with resources.during("train"):
        assert resources.asked(wanted) == Resources(gpus=1)
        with resources.during("cache"):
            assert resources.asked(wanted) == Resources()
    assert resources.asked(wanted) == Resources()


def test_what_a_worker_asks_for_in_ray_s_names() -> None:
    asks = resources.share(Resources(accelerator="A100", memory=16, gpus=2), cpus=4)
    assert asks == {"CPU": 4, "GPU": 2, "memory": 16e9, "accelerator_type:A100": 0.001}
    named = {"num_cpus": 4, "num_gpus": 2, "memory": 16e9, "resources": {"accelerator_type:A100": 0.001}}
    assert resources.options(asks) == named
    assert resources.share(Resources(), cpus=1) == {"CPU": 1}
    assert resources.options({"CPU": 1}) == {"num_cpus": 1}


def test_a_worker_has_to_fit_on_one_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0, "memory": 64e9}, {"CPU": 3.0, "memory": 8e9}]
    assert resources.room(nodes, {"CPU": 2}) == 5
    assert resources.room(nodes, {"CPU": 2, "GPU": 1}) == 1
    assert resources.room(nodes, {"CPU": 1, "memory": 16e9}) == 4
    assert resources.room(nodes, {"CPU": 9}) == 0
    assert resources.room(nodes, {"CPU": 0.5, "GPU": 0.5}) == 2


class Grown:
    """A cluster in Ray's books that gets a second node after a while."""

    def __init__(self, after: int) -> None:
        self.asked, self.after = 0, after

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        node = {"Alive": True, "Resources": {"CPU": 2.0, "memory": 8e9}}
        return [node, node] if self.asked > self.after else [node]


def test_what_cannot_be_met_is_said_at_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.resources.time.sleep", lambda _: None)
    said: list[str] = []
    resources.wait_for_room(Grown(after=4), {"CPU": 2, "memory": 4e9}, 2, said.append)
    (line,) = said
    assert line == (
        "waiting for nodes, 15 min at most: 2 worker(s) are wanted, each asks for 2 CPU, 4 GB memory of a cluster that "
        "has room for 1 (its nodes: 2 CPU, 8 GB memory)"
    )
    with pytest.raises(RuntimeError, match=r"each asks for 4 CPU of a cluster that has room for 0.*add nodes"):
        resources.wait_for_room(Grown(after=99), {"CPU": 4}, 1, said.append, patience=0)


def test_local_is_local_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert cluster.address_of(config(ray_address="local").ray_address) == cluster.LOCAL
    assert cluster.address_of(config().ray_address) == "http://127.0.0.1:8265"
