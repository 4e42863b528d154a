"""What is deployed, before any server sees it: the declarations, the form, schedules, retries, pictures."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from infra.environment import DEFAULTS
from pipelines import deploy_commands, deployments, retrying
from pipelines.deployments import Target
from pipelines.overrides import WrongSetting


@pytest.mark.slow
def test_every_stage_and_the_chain_have_a_deployment_in_each_pool() -> None:
    names = deployments.check()
    flows = {name.partition("/")[0] for name in names}
    assert len(names) == 12
    assert flows == {"earloom", "ingest", "cache", "train", "evaluate", "register"}
    for kind, pool in deployments.POOLS.items():
        ours = deployments.declared(Target(kind=kind))
        assert len(ours) == 6
        assert {each["work_pool_name"] for each in ours} == {pool}
        assert {each["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for each in ours} == {"30"}


def test_a_run_of_a_command_line_gives_signs_of_life_in_time() -> None:
    """Commands take the server of `up`, on which `deploy` calls a run crashed that was silent for so long."""
    read = yaml.safe_load(Path(deployments.__file__).parents[1].joinpath("infra/prefect/automations.yaml").read_text())
    (silence,) = (each["trigger"]["within"] for each in read["automations"] if each["name"].endswith("no sign of life"))
    assert int(DEFAULTS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) <= silence / 3


@pytest.mark.slow
def test_only_trainings_wait_for_each_other() -> None:
    made = {each["entrypoint"]: each for each in deployments.declared(Target(trainings=3))}
    limited = {entry for entry, each in made.items() if each["concurrency_limit"]}
    assert limited == {"pipelines.chain.chain", "pipelines.train.train"}
    assert made["pipelines.train.train"]["concurrency_limit"] == 3
    assert made["pipelines.train.train"]["concurrency_options"] == {"collision_strategy": "ENQUEUE"}


@pytest.mark.slow
def test_a_target_decides_pool_image_and_directory() -> None:
    (chain, *_) = deployments.declared(Target(pool="gpus", directory="/srv/work"))
    assert (chain["work_pool_name"], chain["job_variables"]["working_dir"]) == ("gpus", "/srv/work")
    assert chain["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "/srv/work"}}]
    (chain, *_) = deployments.declared(Target(kind="kubernetes", image="registry/earloom:1"))
    assert chain["job_variables"]["image"] == "registry/earloom:1"
    assert "working_dir" not in chain["job_variables"]
    with pytest.raises(ValueError, match="--image is for --type kubernetes"):
        deployments.declared(Target(image="x"))
    with pytest.raises(ValueError, match="no work pool type 'docker'"):
        deployments.declared(Target(kind="docker"))


@pytest.mark.slow
def test_a_plan_holds_what_was_said_and_leaves_the_rest_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLOOM_LAKE", "/only/here")
    parameters = deploy_commands._parameters(
        "funasr_llm", "s3://b/speech", None, None, ["workers=2", "ingest.measure=true", "recipe.stages.lora.epochs=2"]
    )
    assert parameters == {
        "config": {
            "arch": "funasr_llm",
            "data": "s3://b/speech",
            "workers": 2,
            "ingest": {"measure": True},
            "set": {"recipe.stages.lora.epochs": 2},
        }
    }
    plan = deploy_commands._plan(None, "train", "6h", "UTC", parameters)
    assert (plan.name, plan.schedule) == ("funasr_llm-speech", {"interval": 21600, "timezone": "UTC"})
    (only,) = deployments.declared(Target(), plan)
    assert (only["name"], only["entrypoint"]) == ("funasr_llm-speech", "pipelines.train.train")
    assert only["parameters"] == parameters
    with pytest.raises(WrongSetting, match="did you mean 'workers'"):
        deploy_commands._parameters("funasr_llm", "x", None, None, ["workrs=2", "preset=tiny"])
    with pytest.raises(ValueError, match="no stage 'trian'"):
        deployments.declared(Target(), plan._replace(stage="trian"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0 3 * * *", {"cron": "0 3 * * *", "timezone": "Europe/Berlin"}),
        ("every 90 minutes", {"interval": 5400, "timezone": "Europe/Berlin"}),
        ("2d", {"interval": 172800, "timezone": "Europe/Berlin"}),
    ],
)
def test_a_schedule_is_cron_or_an_interval(text: str, wanted: dict[str, Any]) -> None:
    assert deploy_commands.read_schedule(text, "Europe/Berlin") == wanted


@pytest.mark.parametrize(
    ("text", "zone", "said"),
    [("30s", "UTC", "too often"), ("daily at 3", "UTC", "no schedule"), ("6h", "Mars", "zone")],
)
def test_a_wrong_schedule_is_said(text: str, zone: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        deploy_commands.read_schedule(text, zone)


@pytest.mark.slow
def test_the_form_has_choices_defaults_and_a_help_text_for_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.architectures import names

    monkeypatch.setenv("EARLOOM_LAKE", "/only/here")
    schema = deployments.form("pipelines.chain.chain")
    config = schema["definitions"]["RunConfig"]
    fields = config["properties"]
    assert config["required"] == ["arch", "data"]
    assert fields["arch"]["enum"] == names()
    assert (fields["preset"]["enum"], fields["preset"]["default"]) == (["paper", "small", "tiny"], "small")
    assert fields["ingest"]["$ref"] == "#/definitions/Ingest"
    assert "default" not in fields["lake"]  # the worker's, not this machine's
    assert "/only/here" not in str(schema)
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_what_the_server_has_is_compared_as_it_stores_it() -> None:
    assert deployments._same({"a": 1}, {"a": 1, "grace": None})
    assert deployments._same(["b", "a"], ["a", "b"])
    assert deployments._same(None, [])
    assert not deployments._same({"a": 1}, {"a": 1, "b": 2})
    assert not deployments._same([{"a": 1}], [{"a": 2}])
    assert not deployments._same(1, None)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionError("the store does not answer"), True),
        (TimeoutError(), True),
        (OSError("input/output error"), True),
        (FileNotFoundError("no such folder"), False),
        (ValueError("no setting 'workrs'"), False),
        (RuntimeError("not there: run `earloom ingest` first"), False),
    ],
)
def test_only_faults_that_may_pass_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool
) -> None:
    state = SimpleNamespace(result=lambda raise_on_failure: error)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "of a worker")
    assert retrying.may_pass(None, None, state) is again
    monkeypatch.delenv("PREFECT__FLOW_RUN_ID")
    assert not retrying.may_pass(None, None, state)  # a person who watches is told at once


@pytest.mark.slow
def test_stages_say_how_often_they_are_tried() -> None:
    from pipelines.ingest import ingest_audio
    from pipelines.register import register_model
    from pipelines.train import train_stages

    assert (ingest_audio.retries, ingest_audio.retry_delay_seconds) == (3, [10, 60, 300])
    assert (register_model.retries, train_stages.retries) == (3, 1)


@pytest.mark.slow
def test_curves_are_pictures_that_need_no_page_around_them() -> None:
    from pipelines.artifacts import curves_page

    lines = [{"stage": "lora", "step": step, "loss": 4.0 / (step + 1), "tasks": {"asr": 1.0}} for step in range(30)]
    page = curves_page(lines)
    pictures = re.findall(r"\(data:image/svg\+xml;base64,([^)]+)\)", page)
    assert len(pictures) == 2
    for code in pictures:
        text = base64.b64decode(code).decode()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert {"width", "height", "viewBox"} <= set(root.attrib)
        used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
        assert used <= defined
        assert "hit" not in text
    assert "loss, mean goes from" in page


@pytest.mark.slow
def test_links_lead_to_pages_and_carry_no_password() -> None:
    from pipelines.artifacts import dashboard, model_page

    assert model_page("http://u:secret-word@host:5000/", "m", "3") == "http://***@host:5000/#/models/m/versions/3"
    assert model_page("sqlite:///lake/mlflow.db", "m", "3") is None
    assert dashboard("https://head:8265") == "https://head:8265"
    assert dashboard(None) is None
