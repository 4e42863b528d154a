"""The files in infra/ that set up machines, as the tests read them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import utils, validate

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
BASE = INFRA / "kubernetes/base"
EXAMPLE = INFRA / "kubernetes/overlays/example"
COMPOSE = INFRA / "compose/compose.yaml"
DOCKERFILE = INFRA / "images/Dockerfile"
LAUNCHERS = ("aws", "gcp")
KUBERNETES = "1.32"  # the oldest that the files are checked against

Object = dict[str, Any]

utils.schema_contents = cache(utils.schema_contents)  # it would read all definitions anew for every object


def strict(value: Object) -> None:
    """Raise unless an object of Kubernetes is valid and has no word that its schema does not know."""
    validate(value, KUBERNETES, strict=True)


def documents(path: Path) -> list[Object]:
    """All YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


@cache
def compose() -> Object:
    """compose.yaml with its anchors followed and its variables as they are written."""
    return dict(documents(COMPOSE)[0])


def launcher(cloud: str) -> Object:
    return documents(INFRA / f"ray/{cloud}.yaml")[0]


@cache
def base_objects() -> tuple[Object, ...]:
    """Every object that is written down in kubernetes/base and the RayJob; not what kustomize generates."""
    names = [*documents(BASE / "kustomization.yaml")[0]["resources"], "../rayjob/rayjob.yaml"]
    return tuple(found for name in names for found in documents(BASE / name))


def of_kind(*kinds: str) -> list[Object]:
    return [found for found in base_objects() if found["kind"] in kinds]


def named(kind: str, name: str) -> Object:
    return next(found for found in of_kind(kind) if found["metadata"]["name"] == name)


def job_template() -> Object:
    return dict(json.loads((BASE / "job-template.json").read_text()))


def flow_run_pod() -> Object:
    """The pod of a flow run, its placeholders as they are."""
    return dict(job_template()["job_configuration"]["job_manifest"]["spec"]["template"])


def ray_groups(cluster: Object) -> dict[str, Object]:
    """Pod templates of a RayCluster's spec by name of the group."""
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]} | groups


def pods() -> Iterator[tuple[str, Object]]:
    """Every pod template that anything in infra/kubernetes makes, with a name for the test's message."""
    for found in of_kind("Deployment", "StatefulSet"):
        yield found["metadata"]["name"], found["spec"]["template"]
    for found in of_kind("RayCluster"):
        yield from ((f"ray {name}", pod) for name, pod in ray_groups(found["spec"]).items())
    for found in of_kind("RayJob"):
        yield "submitter", found["spec"]["submitterPodTemplate"]
        yield from ((f"job {name}", pod) for name, pod in ray_groups(found["spec"]["rayClusterSpec"]).items())
    yield "flow run", flow_run_pod()


def pins(path: Path) -> dict[str, str]:
    """name -> version of a file of pins."""
    lines = (line.split("#")[0].split(";")[0].strip() for line in path.read_text().splitlines())
    return {name.lower().replace("_", "-"): version for line in lines if line for name, version in [line.split("==")]}


@cache
def new_secrets() -> dict[str, dict[str, str]]:
    """What new-secrets.sh prints: name of the secret -> its keys and values."""
    command = ["sh", str(INFRA / "kubernetes/new-secrets.sh")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {found["metadata"]["name"]: found["stringData"] for found in yaml.safe_load_all(text)}


def program(name: str) -> str:
    """A program beside this Python or on the path; the test is skipped where there is none."""
    found = Path(sys.executable).parent / name
    place = str(found) if found.is_file() else shutil.which(name)
    if place is None:
        pytest.skip(f"{name} is not here: its wheel is for Linux on x86-64")
    return place


def kustomize() -> list[str]:
    """What builds an overlay: kustomize itself, or the one in kubectl."""
    if alone := shutil.which("kustomize"):
        return [alone, "build"]
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    pytest.skip("neither kubectl nor kustomize is here")


def built(folder: Path) -> list[Object]:
    """What kustomize makes of a folder."""
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found is not None]


def fresh_env(folder: Path) -> Path:
    """A folder like infra/compose with an .env that new-env.sh has just made."""
    shutil.copytree(COMPOSE.parent, folder, ignore=shutil.ignore_patterns(".env"))
    subprocess.run(["sh", str(folder / "new-env.sh")], check=True, capture_output=True)
    return folder / ".env"


def resolved(env: Path, *more: Path) -> Object:
    """What docker compose makes of compose.yaml: everything interpolated and normalised. It needs no daemon."""
    files = [word for path in (COMPOSE, *more) for word in ("-f", str(path))]
    command = [program("docker-compose"), "--env-file", str(env), *files, "config", "--format", "json"]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@cache
def instructions() -> tuple[tuple[str, str], ...]:
    """The Dockerfile as (INSTRUCTION, rest), continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return tuple((line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines())


@cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of each stage -> its instructions, the FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        if name:
            found[name].append((word, rest))
    return found
