"""Servers of a team on one machine: Prefect, MLflow and a worker, each a detached process with a log.

What they keep lies in `<home>/services`, which only its owner may enter. They listen on loopback; on any other
address only with authentication. No password is on a command line: other users of the machine could read it there.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from infra import processes, s3
from infra.environment import DEFAULTS

LOOPBACK = "127.0.0.1"
START_SECONDS = 300.0  # MLflow takes half a minute on two quiet cores, two minutes were seen on busy ones
QUIET = "CRITICAL"
# Of the person's shell; they would lead a server to another API, or open it with another password than ours.
OTHERS = ("API_URL", "API_KEY", "API_AUTH_STRING", "PROFILE", "SERVER_API_AUTH_STRING", "SERVER_API_PORT", "HOME")
GET_MLFLOW = "`uv tool install 'mlflow[auth]==3.17.2'` (or a venv of its own; name its program in $EARLOOM_MLFLOW)"


class Service(NamedTuple):
    """A process that was started: for clients its `url`, for us its pid, and when that started (since 1970, s)."""

    name: str
    url: str
    pid: int
    log: Path
    began: float
    host: str = LOOPBACK
    auth: bool = False


def folder(home: Path) -> Path:
    """Where services keep what they know; made for its owner only."""
    place = home / "services"
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    return place.resolve()


def start_prefect(
    home: Path,
    port: int | None = None,
    host: str = LOOPBACK,
    auth: str | None = None,
    *,
    names: Sequence[str] = (),
    wait: bool = True,
) -> Service:
    """Start a Prefect server with its sqlite file in `home`; port: default a free one; `auth`: "user:password".

    `names`: others by which browsers reach this machine. Raises ValueError for an address that is not loopback
    without `auth`, OSError for a taken port, RuntimeError if it dies or does not answer in time.
    """
    port = check(host, port, auth, "--prefect-port")
    place = folder(home)
    known = _names(host, names)
    seen = known[0] if names or not _wildcard(host) else socket.gethostname()
    own = {
        "PREFECT_HOME": str(place / "prefect"),
        # In the environment and not as --port: with the flag the pages would still ask port 4200.
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_LOGGING_LEVEL": _level("PREFECT_SERVER_LOGGING_LEVEL", "WARNING"),
        "PREFECT_LOGGING_LEVEL": _level("PREFECT_LOGGING_LEVEL", "WARNING"),
        # In memory, a server that was started anew would not know who has a place in a limit, and never free it.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_UI_API_URL": os.environ.get("PREFECT_UI_API_URL") or f"http://{_bracketed(seen)}:{port}/api",
        # Else any page that is open in a browser of this machine could start flows.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{_bracketed(name)}:{port}" for name in known),
    }
    if auth:
        own |= {"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    service = _launch("prefect", f"http://{_bracketed(_local(host))}:{port}/api", command, own, place, host, auth)
    return await_answer(service, auth) if wait else service


def start_worker(
    home: Path, pool: str, api_url: str, auth: str | None = None, *, environment: Mapping[str, str] | None = None
) -> Service:
    """Start a worker of a process pool, which is made if it is not there; its flow runs inherit `environment`.

    Raises RuntimeError if it dies or if the server does not hear from it in time.
    """
    place = folder(home)
    own = {
        "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_API_URL": api_url,
        # What a flow run logs is what its page shows.
        "PREFECT_LOGGING_LEVEL": _level("PREFECT_LOGGING_LEVEL", "INFO"),
    }
    if auth:
        own["PREFECT_API_AUTH_STRING"] = auth
    command = [sys.executable, "-m", "prefect", "worker", "start"]
    command += ["--pool", pool, "--type", "process", "--name", _worker_name(pool)]
    name = "worker" if pool == "earloom" else f"worker-{pool}"
    service = _launch(name, api_url, command, own | dict(environment or {}), place, LOOPBACK, auth)
    return await_answer(service, auth, pool)


def start_mlflow(
    home: Path,
    port: int | None = None,
    host: str = LOOPBACK,
    auth: str | None = None,
    artifacts: str | None = None,
    *,
    backend: str | None = None,
    names: Sequence[str] = (),
    wait: bool = True,
) -> Service:
    """Start an MLflow server; `backend`: sqlite file in `home` by default; `artifacts`: folder or URL.

    Raises what `start_prefect` raises, and FileNotFoundError if no full MLflow is installed.
    """
    port = check(host, port, auth, "--mlflow-port")
    program = mlflow_program()
    place = folder(home)
    data = place / "mlflow"
    data.mkdir(exist_ok=True)
    command = [program, "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--no-access-log"]  # else each look at /health is a line
    command += ["--backend-store-uri", backend or f"sqlite:///{data}/mlflow.db"]
    command += ["--artifacts-destination", artifacts or str(data / "artifacts")]
    known = _names(host, names)
    command += ["--allowed-hosts", ",".join(f"{_bracketed(name)}:{port}" for name in known)]
    command += ["--cors-allowed-origins", ",".join(f"http://{_bracketed(name)}:{port}" for name in known)]
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **s3.mlflow_environment()}
    if auth:
        command += ["--app-name", "basic-auth"]
        own |= _mlflow_auth(place, data, auth)
    service = _launch("mlflow", f"http://{_bracketed(_local(host))}:{port}", command, own, place, host, auth)
    return await_answer(service, auth) if wait else service


def stop(service: Service, seconds: float = 15.0) -> None:
    """End a service with all its children: asked first, killed after `seconds`. What is gone already is no error."""
    processes.end(service.pid, service.began, seconds, service.log.parent)


def await_answer(service: Service, auth: str | None = None, pool: str = "earloom") -> Service:
    """Wait until the service answers and return it; if it does not, end it and raise RuntimeError with its log."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(service, auth, pool):
        died = not processes.alive(service.pid, service.began)
        if not died and time.monotonic() < deadline:
            time.sleep(0.25)
            continue
        stop(service)
        why = "died while starting" if died else f"does not answer after {START_SECONDS:.0f} s"
        raise RuntimeError(f"{service.name} {why}; the end of {service.log}:\n{processes.tail(service.log)}")
    return service


def answers(service: Service, auth: str | None = None, pool: str = "earloom") -> bool:
    """Whether it does its work now: a server answers, a worker was heard of by its server since it started."""
    try:
        if not service.name.startswith("worker"):
            return get(f"{service.url}/health", seconds=5.0) is not None
        listed = get(f"{service.url}/work_pools/{pool}/workers/filter", auth, {"limit": 200})
    except OSError:
        return False
    mine = [worker for worker in listed if worker["name"] == _worker_name(pool)]
    return any(
        worker["status"] == "ONLINE"
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > service.began
        for worker in mine
    )


def get(url: str, auth: str | None = None, body: Any = None, seconds: float = 10.0) -> Any:
    """Ask a server on this machine: GET, or POST of `body` as JSON; returns JSON or text. Raises OSError.

    Prefect answers 503 while another of its writers holds SQLite: nothing was done. It is asked again for `seconds`.
    """
    headers = {"Content-Type": "application/json"}
    if auth:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    deadline = time.monotonic() + seconds
    while True:
        try:
            with _opener.open(request, timeout=seconds) as answer:
                text = answer.read().decode()
            break
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    try:
        return json.loads(text)
    except ValueError:
        return text


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find our loopback


def mlflow_program() -> str:
    """The `mlflow` that can serve. Raises FileNotFoundError with the remedy: mlflow-skinny has no pages to serve."""
    named = os.environ.get("EARLOOM_MLFLOW")
    if named:
        if _serves(Path(named)):
            return named
        raise FileNotFoundError(f"$EARLOOM_MLFLOW is {named}, which is no full MLflow: {GET_MLFLOW}")
    beside = [
        Path(sys.executable).parent / "mlflow",
        Path(shutil.which("mlflow") or ""),
        Path.home() / ".local/bin/mlflow",
    ]
    for program in beside:
        if _serves(program):
            return str(program)
    raise FileNotFoundError(f"no MLflow here can serve (mlflow-skinny has no pages): {GET_MLFLOW}")


def _serves(program: Path) -> bool:
    """Whether the environment of this program holds MLflow's pages: those come with the full package only."""
    if not (program.is_file() and os.access(program, os.X_OK)):
        return False
    environment = program.resolve().parent.parent
    return any(environment.glob("lib/python3*/*-packages/mlflow/server/js/build/index.html"))


def _mlflow_auth(place: Path, data: Path, auth: str) -> dict[str, str]:
    user, _, password = auth.partition(":")
    if len(password) < 12:
        raise ValueError("MLflow wants a password of 12 characters or more: set $EARLOOM_AUTH to user:password")
    settings = data / "basic-auth.ini"
    lines = ("[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{data}/basic-auth.db")
    processes.write_private(settings, "\n".join([*lines, f"admin_username = {user}", ""]).replace("%", "%%"))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret(place / "mlflow-key"),
    }


def secret(file: Path) -> str:
    """What the file holds; if there is none, 32 random characters that are kept in it for its owner only."""
    if not file.is_file():
        processes.write_private(file, secrets.token_urlsafe(24))
    return file.read_text().strip()


def _launch(
    name: str, url: str, command: Sequence[str], own: Mapping[str, str], place: Path, host: str, auth: str | None
) -> Service:
    hidden = {"EARLOOM_AUTH", *(f"PREFECT_{word}" for word in OTHERS)}
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    log = place / f"{name}.log"
    pid, began = processes.launch(command, {**DEFAULTS, **kept, **own}, place, log)
    return Service(name, url, pid, log, began, host, bool(auth))


def check(host: str, port: int | None, auth: str | None, flag: str) -> int:
    """The port to listen on, a free one if none is given. Raises what `start_prefect` raises before it starts."""
    if not auth and not processes.is_loopback(host):
        raise ValueError(f"{host} is open to others: only with authentication, --auth or $EARLOOM_AUTH=user:password")
    if auth and (":" not in auth or auth.startswith(":") or auth.endswith(":")):
        raise ValueError("authentication is user:password, both not empty")
    if port is not None and processes.taken(host, port):
        raise OSError(f"port {port} is taken by {processes.listener(port)}: end that, or name another with {flag}")
    return processes.free_port() if port is None else port


def _level(setting: str, level: str) -> str:
    """The person's own level of logging, else this one: our command line keeps its own processes silent."""
    own = os.environ.get(setting, QUIET)
    return level if own == QUIET else own


def _worker_name(pool: str) -> str:
    return f"{pool}-{socket.gethostname()}"


def _wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::", "")


def _local(host: str) -> str:
    return LOOPBACK if _wildcard(host) else host


def _names(host: str, more: Sequence[str]) -> list[str]:
    """By what a browser may call the server: of `more` first."""
    public = [] if processes.is_loopback(host) else [socket.gethostname(), socket.getfqdn()]
    if _wildcard(host):
        public += processes.addresses()
    return list(dict.fromkeys([*more, _local(host), *public, LOOPBACK, "localhost"]))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
