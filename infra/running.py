"""Which services run here: a file that says so, made true again by `up`, `look` and `down`.

`<home>/services/services.json` holds addresses and pids, no secret; the password lies beside it. Only one process at
a time changes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infra import flow_runs, processes, services
from infra.services import LOOPBACK, START_SECONDS, Service

POOL = "earloom"
FILE, DAMAGED = "services.json", "is damaged: end what runs by hand, then delete it"
ORDER, SERVERS = ("prefect", "worker", "mlflow"), ("prefect", "mlflow")
RUNNING, SILENT, GONE = "running", "does not answer", "not running"
OTHER = "waiting for another `earloom up` or `down`"
SHORTEST = 12  # characters of a password; MLflow refuses less
PATIENCE = 10.0  # seconds for the answer of one that was up already

Say = Callable[[str], object]


class Wanted(NamedTuple):
    """What `up` is asked for; what is empty stays as it was. `names`: by which others reach this machine."""

    host: str = ""
    prefect_port: int | None = None
    mlflow_port: int | None = None
    auth: str | None = None
    lake: str | None = None
    names: tuple[str, ...] = ()


DEFAULTS = Wanted(LOOPBACK, 4200, 5000)


class Seen(NamedTuple):
    """A service and how it is."""

    service: Service
    state: str


class Started(NamedTuple):
    """What `up` started, and in one line why MLflow is not among the services; None if it is."""

    names: list[str]
    without_mlflow: str | None


class Ended(NamedTuple):
    """What `down` ended: services, and names of flow runs."""

    services: list[Service]
    flow_runs: list[str]


def up(place: Path, wanted: Wanted, say: Say = lambda text: None) -> Started:
    """Start what does not run; what answers is left alone. `say` is told what is waited for.

    Raises ValueError if what runs is not what is asked for, else what `infra.services` raises; what was started until
    then runs on and is known.
    """
    with processes.locked(services.folder(place) / ".lock", lambda: say(OTHER)):
        was, before = read(place), _wanted_before(place)
        known: dict[str, Service] = {name: was[name] for name in SERVERS if name in was and _holds(was[name])}
        _refuse_changes(known, wanted, before)
        auth = _agreed(place, was, known, wanted.auth)
        wanted = before._replace(**_given(wanted), auth=auth)
        for name, service in was.items():
            if name == "worker":
                known[name] = service
            elif name not in known:  # killed, it may have left a child that holds the port
                processes.end(service.pid, service.began, PATIENCE, service.log.parent)
        for name in SERVERS:
            if name not in known:
                services.check(wanted.host, getattr(wanted, f"{name}_port"), auth, f"--{name}-port")
        problem = _launch(place, known, wanted)
        _settle(place, known, wanted, "prefect", say)
        _worker(place, known, wanted, say)
        if "mlflow" in known:
            _settle(place, known, wanted, "mlflow", say)
    return Started([name for name in ORDER if name in known and known[name] != was.get(name)], problem)


def down(place: Path, seconds: float = 15.0, say: Say = lambda text: None) -> Ended:
    """End the worker with its flow runs, then the servers, then what they left behind. Databases stay."""
    folder = services.folder(place)
    ended: list[Service] = []
    runs: list[str] = []
    crashed: list[str] = []
    with processes.locked(folder / ".lock", lambda: say(OTHER)):
        known, auth = read(place), auth_in_force(place)
        if "worker" in known:
            say("worker ends")
            api = known["worker"].url
            with contextlib.suppress(OSError):  # a server that is gone can neither be asked nor told
                runs = flow_runs.active(api, auth)
            servers = [known[name] for name in SERVERS if name in known]
            gone = _end(known["worker"], seconds, ended)
            gone |= processes.sweep(folder, {pid for s in servers for pid in processes.members(s.pid, s.began, folder)})
            with contextlib.suppress(OSError):
                crashed = flow_runs.crash(api, auth, runs, gone)
        for name in SERVERS:
            if name in known:
                say(f"{name} ends")
                _end(known[name], seconds, ended)
        processes.sweep(folder)
        _write(place, {}, DEFAULTS)
    return Ended(ended, crashed)


def _end(service: Service, seconds: float, ended: list[Service]) -> set[int]:
    ran = processes.alive(service.pid, service.began)
    pids = processes.end(service.pid, service.began, seconds, service.log.parent)
    if ran:
        ended.append(service)
    return pids


def look(place: Path) -> list[Seen]:
    """What was started here and how it is now; nothing if all was ended by `down`."""
    auth = auth_in_force(place)
    return [Seen(service, _state(service, auth)) for service in read(place).values()]


def purge(place: Path) -> None:
    """Delete databases, logs and passwords of the services. Raises RuntimeError while one of them runs."""
    folder = services.folder(place)
    with processes.locked(folder / ".lock"):
        if any(processes.alive(service.pid, service.began) for service in read(place).values()):
            raise RuntimeError("services are running: `earloom down` first")
        shutil.rmtree(folder)


def read(place: Path) -> dict[str, Service]:
    """The services that were started and not ended; whether they still run is not asked."""
    rows = _state_file(place).get("services", [])
    try:
        known = {row["name"]: Service(**row | {"log": Path(row["log"])}) for row in rows}
    except (KeyError, TypeError):
        raise RuntimeError(f"{place / 'services' / FILE} {DAMAGED}") from None
    return {name: known[name] for name in ORDER if name in known}


def auth_in_force(place: Path) -> str | None:
    """user:password of the services here; None if they ask for none."""
    return _kept_auth(place) if any(service.auth for service in read(place).values()) else None


def new_auth(place: Path) -> str:
    """The user and password that were used here before, else new ones that nobody guesses."""
    return _kept_auth(place) or f"earloom:{secrets.token_urlsafe(24)}"


def client_environment(place: Path, secret: bool = True, servers: Sequence[str] = SERVERS) -> dict[str, str]:
    """What a shell needs to reach those of the servers that answer; with `secret`, also the password asked for."""
    auth = auth_in_force(place)
    told = auth if secret else None
    settings: dict[str, str] = {}
    for name, service in read(place).items():
        if name not in servers or _state(service, auth) != RUNNING:
            continue
        if name == "mlflow":
            settings |= _mlflow_client(service.url, told)
        else:
            settings |= {"PREFECT_API_URL": service.url} | ({"PREFECT_API_AUTH_STRING": told} if told else {})
    return settings


def _launch(place: Path, known: dict[str, Service], wanted: Wanted) -> str | None:
    """Launch the servers that are not known, without waiting: both together take no longer than one."""
    host, auth, names = wanted.host, wanted.auth, wanted.names
    if "prefect" not in known:
        known["prefect"] = services.start_prefect(place, wanted.prefect_port, host, auth, names=names, wait=False)
        _write(place, known, wanted)
    if "mlflow" in known:
        return None
    backend, artifacts = _stores(wanted.lake)
    try:
        known["mlflow"] = services.start_mlflow(
            place, wanted.mlflow_port, host, auth, artifacts, backend=backend, names=names, wait=False
        )
    except FileNotFoundError as error:
        return str(error)
    _write(place, known, wanted)
    return None


def _worker(place: Path, known: dict[str, Service], wanted: Wanted, say: Say) -> None:
    """Keep or start the worker. It goes on over a restart of its server: it has flow runs to watch."""
    api, auth = known["prefect"].url, wanted.auth
    old = known.pop("worker", None)
    if old is not None and old.url == api and old.auth == bool(auth) and _holds(old, auth):
        known["worker"] = old
    else:
        if old is not None and processes.alive(old.pid, old.began):  # flow runs of one that was killed go on
            processes.end(old.pid, old.began, PATIENCE, old.log.parent)
        own = {
            "EARLOOM_HOME": str(place.resolve()),
            "EARLOOM_LAKE": wanted.lake or os.environ.get("EARLOOM_LAKE") or os.path.abspath("lake"),
        }
        if "mlflow" in known and "://" in own["EARLOOM_LAKE"] and "MLFLOW_TRACKING_URI" not in os.environ:
            own |= _mlflow_client(known["mlflow"].url, auth)  # a lake that is no folder has no registry of its own
        say("worker")
        known["worker"] = services.start_worker(place, POOL, api, auth, environment=own)
    _write(place, known, wanted)


def _settle(place: Path, known: dict[str, Service], wanted: Wanted, name: str, say: Say) -> None:
    if not services.answers(known[name]):
        say(name)
    try:
        services.await_answer(known[name], wanted.auth)
    except RuntimeError:
        del known[name]
        _write(place, known, wanted)
        raise


def _holds(service: Service, auth: str | None = None) -> bool:
    """Whether it runs and answers; one that has only just started is given its time."""
    young = time.time() - service.began < START_SECONDS
    deadline = time.monotonic() + (START_SECONDS if young else PATIENCE)
    while processes.alive(service.pid, service.began):
        if services.answers(service, auth):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return False


def _state(service: Service, auth: str | None) -> str:
    if not processes.alive(service.pid, service.began):
        return GONE
    return RUNNING if services.answers(service, auth) else SILENT


def _refuse_changes(known: Mapping[str, Service], wanted: Wanted, before: Wanted) -> None:
    concerns = {"prefect": {"host", "prefect_port", "names"}, "mlflow": {"host", "mlflow_port", "names", "lake"}}
    for name, service in known.items():
        other = [key for key, value in _given(wanted).items() if value != getattr(before, key)]
        other = [key.replace("_", "-") for key in other if key in concerns[name]]
        if wanted.auth and not service.auth:
            other.append("authentication")
        if other:
            raise ValueError(
                f"{name} runs at {service.url} with another {other[0]}: `earloom down` first, to change it"
            )


def _given(wanted: Wanted) -> dict[str, Any]:
    return {key: value for key, value in wanted._asdict().items() if value and key != "auth"}


def _agreed(place: Path, was: Mapping[str, Service], known: Mapping[str, Service], asked: str | None) -> str | None:
    """The password in force from now on, kept for its owner. Once asked for, it is until `down`."""
    kept = _kept_auth(place)
    auth = asked or (kept if any(service.auth for service in was.values()) else None)
    if auth and auth != kept:
        if len(auth.partition(":")[2]) < SHORTEST or auth.startswith(":"):
            raise ValueError(f"$EARLOOM_AUTH is not user:password with a password of {SHORTEST} characters or more")
        users = services.folder(place) / "mlflow" / "basic-auth.db"
        if any(service.auth for service in known.values()):
            raise ValueError("the services run with another password: `earloom down` first, to change it")
        if users.exists():
            raise ValueError(f"MLflow's users were made with another password: delete {users} to begin anew")
        processes.write_private(services.folder(place) / "auth", auth + "\n")
    return auth


def _kept_auth(place: Path) -> str | None:
    file = place / "services" / "auth"
    return file.read_text().strip() if file.is_file() else None


def _stores(lake: str | None) -> tuple[str | None, str | None]:
    """MLflow's database and its folder for artifacts: those of the lake, where one is named."""
    if lake is None:
        return None, None
    if "://" in lake:
        return None, f"{lake.rstrip('/')}/mlflow"
    os.makedirs(lake, exist_ok=True)
    return f"sqlite:///{lake}/mlflow.db", f"{lake}/mlflow"


def _mlflow_client(url: str, auth: str | None) -> dict[str, str]:
    if not auth:
        return {"MLFLOW_TRACKING_URI": url}
    user, _, password = auth.partition(":")
    return {"MLFLOW_TRACKING_URI": url, "MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}


def _wanted_before(place: Path) -> Wanted:
    found = _state_file(place).get("wanted", {})
    return DEFAULTS._replace(**found | {"names": tuple(found.get("names", ()))})


def _state_file(place: Path) -> dict[str, Any]:
    file = place / "services" / FILE
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise RuntimeError(f"{file} {DAMAGED}") from None


def _write(place: Path, known: Mapping[str, Service], wanted: Wanted) -> None:
    rows = [{**known[name]._asdict(), "log": str(known[name].log)} for name in ORDER if name in known]
    settings = {key: value for key, value in wanted._asdict().items() if key != "auth"}
    text = json.dumps({"wanted": settings, "services": rows}, indent=2)
    processes.write_private(services.folder(place) / FILE, text + "\n")
