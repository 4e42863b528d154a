"""Nothing that infra/ sets up listens without authentication, holds a secret, or has rights that it does not need."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from deploy_helpers import (
    BASE,
    COMPOSE,
    INFRA,
    LAUNCHERS,
    ROOT,
    Object,
    base_objects,
    compose,
    documents,
    fresh_env,
    launcher,
    named,
    new_secrets,
    of_kind,
    pods,
    stages,
)

SECRET = re.compile(r"PASSWORD|SECRET_KEY|ACCESS_KEY|AUTH_STRING|TOKEN|CONNECTION_URL|STORE_URI|DATABASE_URI")
SERVICES = compose()["services"]
ROOT_ONCE = "s3-volume"  # changes the owner of a volume, has no network, ends


# ---- one machine ----------------------------------------------------------------------------------------------------


def test_every_port_is_published_on_loopback() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(ports) == {"s3", "prefect", "mlflow"}
    assert all(port.startswith("127.0.0.1:") for listed in ports.values() for port in listed)
    assert all("host" not in str(service.get("network_mode")) for service in SERVICES.values())


def test_postgres_is_on_no_network_that_leads_out() -> None:
    assert compose()["networks"]["inside"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == SERVICES["buckets"]["networks"] == ["inside"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_container_has_the_rights_it_needs_and_no_more(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "devices", "pid", "ipc", "userns_mode"} & set(service)
    assert "docker.sock" not in json.dumps(service)
    if name == ROOT_ONCE:
        assert (service["network_mode"], service["cap_add"]) == ("none", ["CHOWN"])
        assert service["entrypoint"] == ["chown", "1000:1000", "/data"] and service["restart"] == "no"
    else:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"]) and "cap_add" not in service
        assert service["mem_limit"] and service["pids_limit"]
    if service.get("restart") != "no":
        assert service["healthcheck"]["test"][0] == "CMD"


def test_servers_of_the_compose_file_ask_for_passwords() -> None:
    prefect = SERVICES["prefect"]["environment"]
    assert re.fullmatch(r"earloom:\$\{PREFECT_PASSWORD:\?.+\}", prefect["PREFECT_SERVER_API_AUTH_STRING"])
    origins = prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert all(re.match(r"http://(127\.0\.0\.1|localhost):", origin) for origin in origins)
    mlflow = SERVICES["mlflow"]["environment"]
    hosts = [host.split(":")[0] for host in mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")]
    assert hosts == ["mlflow", "127.0.0.1", "localhost"] and SERVICES["mlflow"]["command"] == ["mlflow-server"]
    assert SERVICES["worker"]["environment"]["RAY_AUTH_MODE"] == "token"
    s3 = SERVICES["s3"]
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0"} <= set(s3["command"])
    assert [word for word in s3["command"] if "0.0.0.0" in word] == ["-s3.ip.bind=0.0.0.0"]
    assert s3["environment"]["AWS_SECRET_ACCESS_KEY"].startswith("${S3_SECRET_KEY:?")


def test_no_secret_is_written_down() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert re.search(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
        assert not SECRET.search(json.dumps(service.get("command", [])))  # a command line is for all to read
    lines = (COMPOSE.parent / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert {key for key, value in given.items() if not value} == used and len(used) == 8


def test_new_passwords_are_random_private_and_made_once(tmp_path: Path) -> None:
    made = [fresh_env(tmp_path / name) for name in ("one", "two")]
    values = [dict(line.split("=", 1) for line in env.read_text().splitlines() if line[:1].isupper()) for env in made]
    secrets = [value for one in values for value in one.values() if re.fullmatch(r"[0-9a-f]{48}", value)]
    assert len(secrets) == 16 and len(set(secrets)) == 16
    assert all(stat.S_IMODE(env.stat().st_mode) == 0o600 for env in made)
    before = made[0].read_bytes()
    again = subprocess.run(["sh", str(made[0].parent / "new-env.sh")], capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "is there already" in again.stderr and made[0].read_bytes() == before


def test_git_and_docker_leave_the_passwords_out() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (INFRA / "images/Dockerfile.dockerignore").read_text().splitlines()


# ---- MLflow's start -------------------------------------------------------------------------------------------------


def _start_mlflow(tmp_path: Path, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run images/mlflow-server with a program in MLflow's place that says what it was given."""
    script = (
        '#!/bin/sh\necho "$@"; stat -c %a "$MLFLOW_AUTH_CONFIG_PATH"; cat "$MLFLOW_AUTH_CONFIG_PATH"\n'
        'env; rm "$MLFLOW_AUTH_CONFIG_PATH"\n'
    )
    (tmp_path / "mlflow").write_text(script)
    (tmp_path / "mlflow").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | given
    command = ["sh", str(INFRA / "images/mlflow-server")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)


def test_mlflow_does_not_start_without_its_passwords(tmp_path: Path) -> None:
    given = dict(new_secrets()["earloom-mlflow-server"]) | {"MLFLOW_ARTIFACTS_DESTINATION": "s3://x/y"}
    for name in given:
        left = {key: value for key, value in given.items() if key != name}
        for less in (left, left | {name: ""}):
            done = _start_mlflow(tmp_path, less)
            assert done.returncode != 0 and f"{name}: is not set" in done.stderr and not done.stdout


def test_mlflow_asks_who_you_are_and_keeps_its_password_out_of_sight(tmp_path: Path) -> None:
    given = dict(new_secrets()["earloom-mlflow-server"]) | {"MLFLOW_ARTIFACTS_DESTINATION": "s3://x/y"}
    given["MLFLOW_AUTH_DATABASE_URI"] = "postgresql+psycopg2://mlflow:p%40ss@postgres/mlflow_auth"
    done = _start_mlflow(tmp_path, given)
    command, mode, *rest = done.stdout.splitlines()
    assert command.startswith("server --app-name basic-auth ") and mode == "600"
    assert "p%40" not in command and given["MLFLOW_AUTH_ADMIN_PASSWORD"] not in command
    assert "database_uri = postgresql+psycopg2://mlflow:p%%40ss@postgres/mlflow_auth" in rest
    assert not any(line.startswith("MLFLOW_AUTH_DATABASE_URI=") for line in rest)


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def test_nothing_in_the_cluster_is_reached_from_outside() -> None:
    for service in of_kind("Service"):
        assert service["spec"]["type"] == "ClusterIP" and "externalIPs" not in service["spec"]
    assert {found["kind"] for found in base_objects()} == {
        *("Namespace", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "Service", "Deployment", "StatefulSet"),
        *("RayCluster", "RayJob", "NetworkPolicy"),  # and no Ingress, Gateway, Secret or ClusterRole
    }
    text = "\n".join(path.read_text() for path in (INFRA / "kubernetes").rglob("*.yaml"))
    assert not re.search(r"NodePort|LoadBalancer|hostNetwork|hostPort|hostPath|hostPID|privileged", text)


def test_the_namespace_refuses_pods_that_are_not_locked_up() -> None:
    assert of_kind("Namespace")[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(("name", "pod"), [pytest.param(name, pod, id=name) for name, pod in pods()])
def test_a_pod_is_locked_up(name: str, pod: Object) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        guard = container["securityContext"]
        assert guard["allowPrivilegeEscalation"] is False and guard["readOnlyRootFilesystem"] is True
        assert guard["capabilities"] == {"drop": ["ALL"]}
        limits, asked = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(limits) & set(asked)
    token = spec.get("automountServiceAccountToken", True)
    assert token is (name in ("prefect-worker", "ray head", "job head"))  # the two that ask Kubernetes for pods


def test_servers_are_watched() -> None:
    for found in of_kind("Deployment", "StatefulSet"):
        for container in found["spec"]["template"]["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container), container["name"]
            for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
                assert not SECRET.search(json.dumps(container.get(probe, {})))


def test_secrets_come_from_secrets() -> None:
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            listed = container.get("env", [])
            for variable in listed if isinstance(listed, list) else []:
                if SECRET.search(variable["name"]) and not variable["name"].endswith(("_SECRET_NAME", "_SECRET_KEY")):
                    assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"
    worker = named("Deployment", "prefect-worker")["spec"]["template"]["spec"]["containers"][0]
    plain = {variable["name"]: variable.get("value") for variable in worker["env"]}
    where = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_"  # else it stands in the Job of every run
    assert plain[f"{where}KEY"] in new_secrets()[plain[f"{where}NAME"] or ""]
    for found in of_kind("ConfigMap"):
        assert not [key for key in found["data"] if SECRET.search(key)]


def test_new_secrets_are_random_and_fit_each_other() -> None:
    first = new_secrets()
    new_secrets.cache_clear()
    second = new_secrets()
    found = re.compile(r"[0-9a-f]{48}")
    ours, theirs = (set(found.findall(json.dumps(secrets))) for secrets in (first, second))
    assert len(ours) == len(theirs) == 7 and not ours & theirs
    clients, postgres = first["earloom-clients"], first["earloom-postgres"]
    server, mlflow = first["earloom-prefect-server"], first["earloom-mlflow-server"]
    assert server["PREFECT_SERVER_API_AUTH_STRING"] == clients["PREFECT_API_AUTH_STRING"]
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == clients["MLFLOW_TRACKING_PASSWORD"]
    assert (
        f":{postgres['PREFECT_DB_PASSWORD']}@postgres:5432/prefect" in server["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    )
    assert f":{postgres['MLFLOW_DB_PASSWORD']}@postgres:5432/mlflow_auth" in mlflow["MLFLOW_AUTH_DATABASE_URI"]
    assert postgres["POSTGRES_PASSWORD"] not in json.dumps([clients, server, mlflow])


def _allows(policy: Object, component: str) -> bool:
    """Whether a policy is about pods of this component."""
    selector = policy["spec"]["podSelector"]
    names = [*selector.get("matchLabels", {}).values()]
    names += [name for one in selector.get("matchExpressions", []) for name in one["values"]]
    return not selector or component in names


def test_what_is_not_named_does_not_pass() -> None:
    everything = named("NetworkPolicy", "nothing-unless-named")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"] and "ipBlock" not in json.dumps(rule), policy["metadata"]["name"]
            for source in rule["from"]:
                assert source["podSelector"]  # never a whole namespace


def test_who_reaches_the_servers() -> None:
    def sources(component: str) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for policy in of_kind("NetworkPolicy"):
            for rule in policy["spec"].get("ingress", []) if _allows(policy, component) else []:
                for port in rule.get("ports", [{"port": 0}]):
                    for source in rule["from"]:
                        selector = source["podSelector"]
                        names = set(selector.get("matchLabels", {}).values())
                        names |= {name for one in selector.get("matchExpressions", []) for name in one["values"]}
                        found.setdefault(port["port"], set()).update(names)
        return found

    assert sources("postgres") == {5432: {"prefect-server", "mlflow"}}
    assert sources("prefect-server") == {4200: {"prefect-worker", "flow-run", "ray"}}
    assert sources("mlflow") == {5000: {"flow-run", "ray"}}
    assert sources("ray") == {0: {"ray"}, 8265: {"flow-run", "kuberay-operator"}}  # 0: any port
    assert sources("flow-run") == sources("prefect-worker") == {}
    components = {pod["metadata"]["labels"]["app.kubernetes.io/component"] for _, pod in pods()}
    assert components == {"postgres", "prefect-server", "prefect-worker", "mlflow", "flow-run", "ray"}


def test_ray_on_kubernetes_wants_the_token() -> None:
    for spec in (of_kind("RayCluster")[0]["spec"], of_kind("RayJob")[0]["spec"]["rayClusterSpec"]):
        assert spec["authOptions"] == {"mode": "token", "secretName": "earloom-ray"}
        assert (spec["headGroupSpec"]["serviceType"], spec["headGroupSpec"]["enableIngress"]) == ("ClusterIP", False)
    secrets = new_secrets()
    assert secrets["earloom-ray"] == {"auth_token": secrets["earloom-clients"]["RAY_AUTH_TOKEN"]}
    assert named("ConfigMap", "earloom-settings")["data"]["RAY_AUTH_MODE"] == "token"


def test_the_workers_role_ends_at_jobs_and_pods() -> None:
    rules = {(group, what): set(rule["verbs"]) for rule in named("Role", "earloom-prefect-worker")["rules"]
             for group in rule["apiGroups"] for what in rule["resources"]}  # fmt: skip
    assert set(rules) == {("batch", "jobs"), *(("", what) for what in ("pods", "pods/log", "pods/status", "events"))}
    assert all(verbs == {"get", "list", "watch"} for (group, _), verbs in rules.items() if not group)


def test_each_database_is_its_owners_alone() -> None:
    text = (BASE / "postgres-init.sh").read_text()
    assert re.findall(r"CREATE DATABASE (\w+) OWNER (\w+)", text) == [
        *(("prefect", "prefect"), ("mlflow", "mlflow"), ("mlflow_auth", "mlflow"))
    ]
    assert "REVOKE CONNECT ON DATABASE prefect, mlflow, mlflow_auth, postgres FROM PUBLIC" in text
    assert "postgres-init.sh:/docker-entrypoint-initdb.d/" in json.dumps(SERVICES["postgres"]["volumes"])


# ---- clouds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", LAUNCHERS)
def test_a_cluster_has_a_token_and_shows_its_dashboard_to_nobody(cloud: str) -> None:
    config = launcher(cloud)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/earloom/.ray/auth_token": "~/.ray/auth_token"}
    assert config["setup_commands"] == ['test "$RAY_AUTH_MODE" = token && test -s ~/.ray/auth_token']
    head = config["head_start_ray_commands"][-1]
    assert re.findall(r"--dashboard-host=(\S+)", head) == ["127.0.0.1"] and "0.0.0.0" not in json.dumps(config)
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])


@pytest.mark.parametrize("cloud", LAUNCHERS)
def test_a_cluster_file_holds_no_key(cloud: str) -> None:
    text = (INFRA / f"ray/{cloud}.yaml").read_text()
    assert not re.search(r"aws_credentials|gcp_credentials|ssh_private_key|SECRET|AKIA[0-9A-Z]{16}|BEGIN .*KEY", text)
    for name, node in launcher(cloud)["available_node_types"].items():
        settings = node["node_config"]
        if cloud == "aws":
            assert settings["IamInstanceProfile"] == {"Name": f"earloom-ray-{'head' if name == 'head' else 'worker'}"}
        else:
            account = settings["serviceAccounts"][0]["email"]
            assert account.startswith(f"earloom-ray-{'head' if name == 'head' else 'worker'}@")


def test_machines_on_aws_are_in_a_group_of_our_own() -> None:
    """Where there is none, Ray makes one that lets the whole internet in by ssh."""
    config = launcher("aws")
    for node in config["available_node_types"].values():
        assert (
            node["node_config"]["SecurityGroupIds"]
            and node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        )
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
    assert "security_group" not in config["provider"]


def test_machines_on_google_cloud_have_no_public_address() -> None:
    config = launcher("gcp")
    assert config["provider"]["use_internal_ips"] is True and "start-iap-tunnel" in config["auth"]["ssh_proxy_command"]
    for node in config["available_node_types"].values():
        assert [set(one) for one in node["node_config"]["networkInterfaces"]] == [{"subnetwork"}]


# ---- images ---------------------------------------------------------------------------------------------------------


def test_images_do_not_run_as_root_and_hold_no_secret() -> None:
    found = stages()
    for name in ("earloom", "worker", "mlflow"):
        users = [rest for word, rest in found[name] if word == "USER"]
        assert users[-1] == "1000:1000", name
    for word, rest in (step for steps in found.values() for step in steps):
        if word in ("ENV", "ARG"):
            assert not re.search(r"PASSWORD|SECRET|TOKEN=|KEY", rest), rest
        assert word != "ADD" and "curl | " not in rest and "--trusted-host" not in rest
    assert any("RAY_AUTH_MODE=token" in rest for word, rest in found["earloom"] if word == "ENV")
    assert any(word == "HEALTHCHECK" for word, _ in found["mlflow"])


def test_nothing_in_infra_looks_like_a_secret() -> None:
    files = [
        path
        for path in INFRA.rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".json", ".sh", ".md", ".example", "")
    ]
    assert len(files) > 25 and shutil.which("sh")
    for path in files:
        if path.name == ".env":  # a person's own; git does not see it
            continue
        text = path.read_text().replace("PASSWORD :'", "")  # a variable of psql
        assert not re.search(r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|PRIVATE KEY", text), path
        assert not re.search(r"(?i)password['\"]?[ \t]*[:=][ \t]*['\"]?(?!\$|\"|that|<)[a-z0-9]{6,}", text), path
    assert documents(COMPOSE)
