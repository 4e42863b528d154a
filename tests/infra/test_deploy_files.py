"""The files in infra/ are valid by the schema tools of those who read them, and fit each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy_helpers import (
    BASE,
    COMPOSE,
    DOCKERFILE,
    EXAMPLE,
    INFRA,
    LAUNCHERS,
    ROOT,
    Object,
    base_objects,
    built,
    compose,
    documents,
    fresh_env,
    job_template,
    launcher,
    named,
    new_secrets,
    of_kind,
    pods,
    program,
    ray_groups,
    resolved,
    stages,
    strict,
)
from kuberay_fields import faults

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
OURS = ("RayCluster", "RayJob")


def part_of_kubernetes(field: str, value: Any) -> None:
    """Check a field that KubeRay takes over from Kubernetes, inside the smallest object that has it."""
    container = {"name": "x", "image": "x"} | ({} if field == "template" else {field: value})
    template = value if field == "template" else {"spec": {"containers": [container]}}
    strict({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def test_every_object_is_valid_by_the_schema_of_kubernetes() -> None:
    plain = [found for found in base_objects() if found["kind"] not in OURS]
    for found in plain:
        strict(found)
    assert {found["kind"] for found in plain} >= {"Deployment", "StatefulSet", "Service", "NetworkPolicy", "Role"}
    wrong = deepcopy(named("Deployment", "mlflow"))
    wrong["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        strict(wrong)


def test_the_ray_cluster_and_the_ray_job_have_only_fields_that_kuberay_knows() -> None:
    for kind in OURS:
        found = of_kind(kind)
        assert [one["apiVersion"] for one in found] == ["ray.io/v1"]
        assert list(faults(f"{kind}Spec", found[0]["spec"], part_of_kubernetes)) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("authOptions", "mode"), "Token", "authOptions.mode is 'Token'"),
        (("enableInTreeAutoscalling",), True, "enableInTreeAutoscalling is no field"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "rayStartParams is not text to text"),
        (("workerGroupSpecs", 1, "minReplicas"), None, "minReplicas is None"),
        (("headGroupSpec", "template", "spec", "serviceAcount"), "x", "serviceAcount"),
        (("autoscalerOptions", "resources", "limit"), {}, "limit"),
    ],
)
def test_what_kuberay_would_refuse_is_found(path: tuple[str | int, ...], value: Any, said: str) -> None:
    spec = deepcopy(of_kind("RayCluster")[0]["spec"])
    place: Any = spec
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert any(said in fault for fault in faults("RayClusterSpec", spec, part_of_kubernetes))


def test_a_job_brings_the_cluster_that_the_team_has() -> None:
    """They are written down twice; only how long an idle worker stays may differ."""
    cluster, job = deepcopy(of_kind("RayCluster")[0]["spec"]), deepcopy(of_kind("RayJob")[0]["spec"]["rayClusterSpec"])
    assert job["autoscalerOptions"].pop("idleTimeoutSeconds") == 120
    assert cluster["autoscalerOptions"].pop("idleTimeoutSeconds") == 600
    assert job == cluster


def test_a_job_cleans_up_and_the_cluster_scales() -> None:
    job, cluster = of_kind("RayJob")[0]["spec"], of_kind("RayCluster")[0]["spec"]
    assert job["shutdownAfterJobFinishes"] and 0 < job["ttlSecondsAfterFinished"] <= 3600
    assert cluster["enableInTreeAutoscaling"]
    assert [(group["minReplicas"], group["maxReplicas"] > 0) for group in cluster["workerGroupSpecs"]] == [
        (0, True)
    ] * 2
    gpu = ray_groups(cluster)["gpu"]["spec"]
    limits = gpu["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1" and gpu["containers"][0]["image"].endswith("-cuda")
    assert {"nvidia.com/gpu", "earloom/spot"} <= {toleration["key"] for toleration in gpu["tolerations"]}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.slow
def test_the_command_of_a_job_is_one_of_ours() -> None:
    from pipelines.overrides import parse_words, run_config

    entry = of_kind("RayJob")[0]["spec"]["entrypoint"].split()
    patches = documents(EXAMPLE / "rayjob/kustomization.yaml")[0]["patches"][0]["patch"]
    changed = next(one["value"] for one in yaml.safe_load(patches) if one["path"] == "/spec/entrypoint").split()
    for words in (entry, changed):
        assert words[:3] == ["earloom", "run", "--arch"] and words[4] == "--data"
        settings = {"arch": words[3], "data": words[5], "lake": "s3://x/y"}
        assert run_config(settings | parse_words(words[6:])).workers > 1
        assert (ROOT / f"models/architectures/{words[3]}.py").is_file()


# ---- kustomize ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("folder", [EXAMPLE, EXAMPLE / "rayjob"], ids=["example", "rayjob"])
def test_an_overlay_builds_and_its_objects_are_valid(folder: Path) -> None:
    objects = built(folder)
    for found in objects:
        if found["kind"] in OURS:
            assert list(faults(f"{found['kind']}Spec", found["spec"], part_of_kubernetes)) == []
        else:
            strict(found)
        assert found["metadata"].get("namespace", "earloom") == "earloom"
    text = yaml.safe_dump_all(objects)
    images = set(re.findall(r"image: (\S+)", text))
    assert images <= {
        *(f"registry.example.com/team/earloom:{VERSION}-{name}" for name in ("cpu", "cuda", "worker", "mlflow")),
        compose()["services"]["postgres"]["image"],
    }
    assert "CHANGE-ME" not in text and "nodeSelector" in text


def test_every_file_that_a_kustomization_names_is_there_and_none_is_forgotten() -> None:
    for file in sorted((INFRA / "kubernetes").rglob("kustomization.yaml")):
        spec, folder = documents(file)[0], file.parent
        listed = list(spec["resources"])
        listed += [patch["path"] for patch in spec.get("patches", []) if "path" in patch]
        listed += [name.split("=")[-1] for maker in spec.get("configMapGenerator", []) for name in maker["files"]]
        for name in listed:
            assert (folder / name).exists(), f"{file} names {name}"
        lying = {path.name for path in folder.iterdir() if path.is_file()} - {"kustomization.yaml"}
        assert lying <= {Path(name).name for name in listed}, f"{folder} has files that nothing uses"


def test_every_patch_of_the_example_changes_something_that_is_there() -> None:
    for name in ("settings.yaml", "roles.yaml"):
        for patch in documents(EXAMPLE / name):
            target = named(patch["kind"], patch["metadata"]["name"])
            assert set(patch.get("data", {})) <= set(target.get("data", {}))
    cluster, gpus = of_kind("RayCluster")[0], documents(EXAMPLE / "gpus.yaml")[0][0]  # type: ignore[index]
    assert gpus["path"].startswith("/spec/workerGroupSpecs/1/template/spec/")
    assert cluster["spec"]["workerGroupSpecs"][1]["groupName"] == "gpu"


# ---- what one file says of another ----------------------------------------------------------------------------------


def test_what_a_pod_refers_to_is_there() -> None:
    generated = {maker["name"] for maker in documents(BASE / "kustomization.yaml")[0]["configMapGenerator"]}
    maps = {found["metadata"]["name"]: set(found["data"]) for found in of_kind("ConfigMap")}
    accounts = {found["metadata"]["name"] for found in of_kind("ServiceAccount")}
    secrets = new_secrets()
    for name, pod in pods():
        spec = pod["spec"]
        if name != "flow run":  # its names are filled in: test_a_flow_run_is_a_valid_job
            assert spec.get("serviceAccountName") in {None, *accounts}, name
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in generated, name
        for key, source in _sources(spec):
            if name != "flow run":
                known = secrets if "secret" in key.lower() else maps
                assert source["name"] in known, f"{name}: {source}"
                assert source.get("key", "") in {"", *known[source["name"]]}, f"{name}: {source}"
        mounts = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
        claims = {"data"} if name == "postgres" else set()
        assert mounts == {volume["name"] for volume in spec.get("volumes", [])} | claims, name


def _sources(spec: Object) -> Iterator[tuple[str, Object]]:
    for container in spec["containers"]:
        for source in container.get("envFrom", []):
            yield from source.items()
        for variable in container.get("env", []) if isinstance(container.get("env"), list) else []:
            yield from variable.get("valueFrom", {}).items()


def test_services_lead_to_pods() -> None:
    for service in of_kind("Service"):
        component = service["spec"]["selector"]["app.kubernetes.io/component"]
        pod = next(pod for _, pod in pods() if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component)
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])


# ---- Prefect's job template -----------------------------------------------------------------------------------------


def _filled(values: Object) -> Object:
    """The manifest with the variables' defaults and `values`, as Prefect's worker would make it."""
    template = job_template()
    defaults = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    text = json.dumps(template["job_configuration"]["job_manifest"])
    for name, value in (defaults | values).items():
        text = text.replace(f'"{{{{ {name} }}}}"', json.dumps(value))
    manifest: Object = json.loads(text)
    manifest["metadata"]["generateName"] = "x-"
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = ["prefect", "flow-run", "execute"]
    return manifest


def test_a_flow_run_is_a_valid_job() -> None:
    node = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    for values in ({}, {"gpus": 2, "node_selector": node, "env": {"A": "b"}}):
        manifest = _filled(values)
        assert "{{" not in json.dumps(manifest)
        limits = manifest["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits.pop("nvidia.com/gpu") == values.get("gpus", 0)  # their schema wants text, their API takes both
        strict(manifest)
    pod = _filled({})["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] in {found["metadata"]["name"] for found in of_kind("ServiceAccount")}
    settings, secret = pod["containers"][0]["envFrom"]
    assert named("ConfigMap", settings["configMapRef"]["name"]) and secret["secretRef"]["name"] in new_secrets()


def test_each_variable_of_the_job_template_is_used_and_explained() -> None:
    template = job_template()
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    properties = template["variables"]["properties"]
    assert used == set(properties)
    assert all(field["description"] and "default" in field for field in properties.values())
    # What every Kubernetes pool of Prefect has, but for cluster_config: the worker runs in the cluster.
    known = {"command", "env", "labels", "annotations", "name", "namespace", "job_manifest", "stream_output"}
    known |= {"job_watch_timeout_seconds", "pod_watch_timeout_seconds"}
    assert set(template["job_configuration"]) == known


# ---- one machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_docker_compose_accepts_the_files(tmp_path: Path) -> None:
    env = fresh_env(tmp_path / "compose")
    for more in ([], [COMPOSE.parent / "compose.cuda.yaml"]):
        services = resolved(env, *more)["services"]
        assert {"postgres", "s3", "buckets", "prefect", "mlflow", "worker"} <= set(services)
    assert services["worker"]["gpus"] and services["worker"]["environment"]["EARLOOM_LAKE"].startswith("s3://lake/")
    for service in services.values():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind" and volume["target"] != "/recordings":
                assert Path(volume["source"]).is_file()


def test_without_its_passwords_nothing_starts(tmp_path: Path) -> None:
    shutil.copy(COMPOSE.parent / ".env.example", tmp_path / "env")
    command = [program("docker-compose"), "--env-file", str(tmp_path / "env"), "-f", str(COMPOSE), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    for name in ("POSTGRES_PASSWORD", "PREFECT_PASSWORD", "MLFLOW_PASSWORD", "S3_SECRET_KEY"):
        assert f"{name} is missing a value: run new-env.sh first" in done.stderr


# ---- clouds ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_accepts_the_cluster_files() -> None:
    code = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "for path in sys.argv[1:]:\n"
        "    config = prepare_config(yaml.safe_load(open(path)))\n"
        "    validate_config(config)\n"
        "    print(config['provider']['type'], config['available_node_types']['gpu']['max_workers'])\n"
        "config['worker_nodes_'] = {}\n"
        "try:\n"
        "    validate_config(config)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
    )
    files = [str(INFRA / f"ray/{cloud}.yaml") for cloud in LAUNCHERS]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["aws", "4", "gcp", "4", "ValidationError"], done.stderr


@pytest.mark.slow
def test_ec2_knows_every_word_of_the_nodes() -> None:
    """By the same model that boto3 checks a call with."""
    import botocore.session
    import botocore.validate

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    check = botocore.validate.ParamValidator()
    for name, node in launcher("aws")["available_node_types"].items():
        report = check.validate(node["node_config"] | {"MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


@pytest.mark.parametrize("cloud", LAUNCHERS)
def test_workers_come_and_go_and_the_gpu_is_declared(cloud: str) -> None:
    config = launcher(cloud)
    nodes = config["available_node_types"]
    assert config["head_node_type"] == "head" and config["idle_timeout_minutes"] <= 15
    for name in ("cpu", "gpu"):
        assert (nodes[name]["min_workers"], nodes[name]["max_workers"]) == (0, 4)
        assert re.search(r"spot", json.dumps(nodes[name]["node_config"]), re.IGNORECASE)
    assert nodes["gpu"]["resources"] == {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}
    assert nodes["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert not re.search(r"spot", json.dumps(nodes["head"]["node_config"]), re.IGNORECASE)
    assert sum(node.get("max_workers", 0) for node in nodes.values()) <= config["max_workers"]


# ---- images ---------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    command = [program("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_image_copies_is_there_and_let_in() -> None:
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    for steps in stages().values():
        for word, rest in steps:
            if word == "COPY":
                for source in [part for part in rest.split() if not part.startswith("--")][:-1]:
                    assert (ROOT / source).exists() and f"!{source.split('/')[0]}" in ignore, source


def test_torch_is_the_one_for_the_device() -> None:
    cpu, cuda = (next(rest for word, rest in stages()[f"{name}-torch"] if word == "RUN") for name in ("cpu", "cuda"))
    assert "--no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch" in cpu
    assert "uv pip install -c constraints.txt torch" in cuda and "--index-url" not in cuda
    main = " ".join(rest for word, rest in stages()["earloom"] if word == "RUN")
    assert "-c constraints.txt -r pyproject.toml" in main and "--no-deps -r weights.txt" in main
