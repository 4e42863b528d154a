"""The files in infra/ name one version of each part, that of constraints.txt, and flags and variables that it knows."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from deploy_helpers import (
    DOCKERFILE,
    INFRA,
    LAUNCHERS,
    ROOT,
    compose,
    documents,
    launcher,
    named,
    new_secrets,
    of_kind,
    pins,
    pods,
    program,
    stages,
)

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = pins(ROOT / "constraints.txt")

UNKNOWN = """
import pathlib, sys
import mlflow
import prefect.settings as settings
from prefect.settings.legacy import _get_settings_fields

known = set(_get_settings_fields(settings.Settings))
files = pathlib.Path(mlflow.__file__).parent.rglob("*.py")
names = ("environment_variables.py", "cli_args.py")
readers = [file for file in files if file.name in names or file.parent.name == "cli"]
text = "".join(file.read_text() for file in readers)
print([name for name in sys.argv[1:] if name[0] == "P" and name not in known and not hasattr(settings, name)])
print([name for name in sys.argv[1:] if name[0] == "M" and f'"{name}"' not in text])
"""

# ---- versions -------------------------------------------------------------------------------------------------------


def test_images_have_one_tag_and_it_is_our_version() -> None:
    text = "\n".join(path.read_text() for path in sorted(INFRA.rglob("*")) if path.suffix in (".yaml", ".json", ".md"))
    text += DOCKERFILE.read_text()
    tags = re.findall(r"earloom:([\w.$\-]+)-(?:cpu|cuda|worker|mlflow|\$)", text)
    assert len(tags) >= 20 and set(tags) == {VERSION}
    assert "latest" not in {rest.rpartition(":")[2] for word, rest in stages()["base"] if word == "FROM"}
    images = [service["image"] for service in compose()["services"].values()]
    assert all(re.search(r":\d[\w.]*\d([\w.\-]*)", image.replace("${DEVICE:-cpu}", "cpu")) for image in images)


def test_versions_are_those_that_were_tested_together() -> None:
    mlflow = pins(INFRA / "images/mlflow.txt")
    assert mlflow["mlflow"] == mlflow["mlflow-skinny"] == PINS["mlflow-skinny"]
    assert all(mlflow[name] == PINS[name] for name in ("boto3", "botocore", "sqlalchemy", "alembic"))
    assert [found["spec"]["rayVersion"] for found in of_kind("RayCluster")] == [PINS["ray"]]
    assert of_kind("RayJob")[0]["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    dockerfile, makefile = DOCKERFILE.read_text(), (ROOT / "Makefile").read_text()
    uv = re.findall(r"UV_VERSION := (\S+)", makefile)
    assert re.findall(r"uv==(\S+)", dockerfile) == uv and len(uv) == 1
    assert re.search(r"FROM python:3\.11\.\d+-slim-bookworm AS base", dockerfile)
    extra = re.findall(r"[\w-]+==[\d.]+", (INFRA / "ray/gcp.yaml").read_text())
    assert len(extra) == 2 and all(pin in dockerfile and pin in (INFRA / "README.md").read_text() for pin in extra)
    assert (
        compose()["services"]["postgres"]["image"]
        == named("StatefulSet", "postgres")["spec"]["template"]["spec"]["containers"][0]["image"]
    )


def test_workers_serve_the_pools_that_deployments_go_to() -> None:
    prefect = documents(INFRA / "prefect/prefect.yaml")[0]
    pools = [each["work_pool"]["name"] for each in prefect["deployments"]]
    command = compose()["services"]["worker"]["command"]
    assert command[command.index("--pool") + 1] in pools and command[command.index("--type") + 1] == "process"
    worker = named("Deployment", "prefect-worker")["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "--type=kubernetes" in worker and {f"--pool={name}" for name in pools} & set(worker)
    assert prefect["prefect-version"] == PINS["prefect"]


# ---- command lines --------------------------------------------------------------------------------------------------


def _commands() -> dict[str, list[str]]:
    """program + subcommand -> the flags that infra's files give it."""
    found: dict[str, list[str]] = {}
    services = [service.get("command") or [] for service in compose()["services"].values()]
    lines = [[str(word) for word in words] for words in services]
    lines += [
        [str(word) for word in container.get("command", [])]
        for _, pod in pods()
        for container in pod["spec"]["containers"]
    ]
    for cloud in LAUNCHERS:
        config = launcher(cloud)
        lines += [
            line.split("; ")[-1].split()
            for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]
        ]
    lines += [(DOCKERFILE.parent / "mlflow-server").read_text().rpartition("exec ")[2].split()]
    for words in lines:
        head = [word for word in words if not word.startswith("-")]
        size = {"prefect": 3, "ray": 2, "mlflow": 2}.get(head[0] if head else "", 0)
        if size:
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            found.setdefault(" ".join(head[:size]), []).extend(flags)
    return found


@pytest.mark.slow
def test_the_programs_know_the_flags_that_the_files_give_them() -> None:
    commands = _commands()
    assert set(commands) == {"prefect server start", "prefect worker start", "ray start", "ray stop", "mlflow server"}
    asked = {
        command: subprocess.Popen([program(name), *rest, "--help"], stdout=subprocess.PIPE, text=True)
        for command in commands
        for name, *rest in [command.split()]
    }
    for command, process in asked.items():
        said, _ = process.communicate(timeout=300)
        for flag in commands[command]:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", said), f"{command} has no {flag}"
    assert len(commands["ray start"]) >= 10 and "--app-name" in commands["mlflow server"]


@pytest.mark.slow
def test_the_variables_that_the_files_set_are_ones_that_prefect_and_mlflow_read() -> None:
    names = {name for service in compose()["services"].values() for name in service.get("environment", {})}
    names |= {name for keys in new_secrets().values() for name in keys} | set(
        named("ConfigMap", "earloom-settings")["data"]
    )
    names |= {variable["name"] for name, pod in pods() if name != "flow run" for container in pod["spec"]["containers"]
              for variable in container.get("env", [])}  # fmt: skip
    names |= set(documents(INFRA / "prefect/prefect.yaml")[0]["definitions"]["environment"])
    own = {"MLFLOW_AUTH_DATABASE_URI"}  # of images/mlflow-server
    prefect = sorted(name for name in names if name.startswith("PREFECT_") and "_DB_" not in name)
    prefect = [name for name in prefect if "INTEGRATIONS" not in name]  # of prefect-kubernetes
    mlflow = sorted(name for name in names if name.startswith("MLFLOW_") and "_DB_" not in name and name not in own)
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN, *prefect, *mlflow], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr
    assert len(prefect) > 8 and len(mlflow) > 8
