"""Services of a team: real processes, a real Prefect server and worker, and a real MLflow where one can serve."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from infra import processes, running, services
from infra.environment import prepare
from infra.services import Service

prepare()
PASSWORD = "ann:p%w$or: d-long-enough"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; what carries its mark when the test ends is ended."""
    place = services.folder(tmp_path)
    yield place
    processes.sweep(place)


def launched(folder: Path, script: str, name: str = "prefect") -> Service:
    pid, began = processes.launch(["sh", "-c", script], os.environ, folder, folder / f"{name}.log")
    return Service(name, "http://127.0.0.1:9", pid, folder / f"{name}.log", began)


@pytest.fixture
def full_mlflow() -> None:
    try:
        services.mlflow_program()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def until(condition: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def status(url: str, auth: str | None = None, **headers: str) -> int:
    if auth:
        headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_process_is_detached_and_its_log_is_private(folder: Path) -> None:
    service = launched(folder, "echo hello; exec sleep 60")
    assert os.getsid(service.pid) == service.pid != os.getsid(0)
    assert until(lambda: processes.tail(service.log) == "hello")
    assert service.log.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    services.stop(service)
    assert not psutil.pid_exists(service.pid)
    services.stop(service)  # again is no error


def test_what_a_process_left_behind_is_ended_too(folder: Path) -> None:
    """A grandchild in a session of its own, and one that ignores being asked."""
    script = "setsid sleep 61 & echo $!; sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done' & exec sleep 62"
    service = launched(folder, script)
    assert until(lambda: len(processes.tail(service.log).split()) == 2)
    children = [int(word) for word in processes.tail(service.log).split()]
    assert all(psutil.pid_exists(pid) for pid in children)
    ended = processes.end(service.pid, service.began, 0.3, folder)
    assert {service.pid, children[1]} <= ended
    assert not [pid for pid in [service.pid, *children] if processes.began(pid)]


def test_children_of_a_killed_leader_are_found_by_their_session(folder: Path) -> None:
    service = launched(folder, "sleep 63 & echo $!; wait")
    assert until(lambda: processes.tail(service.log))
    child = int(processes.tail(service.log))
    os.kill(service.pid, signal.SIGKILL)
    assert until(lambda: not processes.alive(service.pid, service.began))
    assert processes.began(child)
    assert child in processes.end(service.pid, service.began, 5.0, folder)
    assert until(lambda: not processes.began(child))


def test_a_pid_of_somebody_else_is_never_touched(folder: Path) -> None:
    stranger = subprocess.Popen(["sleep", "64"], start_new_session=True)
    try:
        began = processes.began(stranger.pid)
        assert began is not None
        stale = Service("prefect", "http://127.0.0.1:9/api", stranger.pid, folder / "prefect.log", began - 100.0)
        home = folder.parent
        running._write(home, {"prefect": stale, "worker": stale._replace(name="worker")}, running.DEFAULTS)
        assert [(seen.service.name, seen.state) for seen in running.look(home)] == [
            ("prefect", running.GONE),
            ("worker", running.GONE),
        ]
        assert running.down(home) == ([], [])
        assert running.read(home) == {}
        assert stranger.poll() is None
        assert processes.sweep(folder) == set()  # it carries no mark of ours
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_one_that_dies_while_starting_is_told_with_the_end_of_its_log(folder: Path) -> None:
    service = launched(folder, "for i in $(seq 30); do echo line $i; done; echo no such table >&2; exit 3")
    with pytest.raises(
        RuntimeError, match=r"prefect died while starting; .*prefect\.log:\n(line \d+\n){11}no such table"
    ):
        services.await_answer(service)


def test_one_that_never_answers_is_given_up_and_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "START_SECONDS", 0.3)
    service = launched(folder, "exec sleep 65")
    with pytest.raises(RuntimeError, match="does not answer after 0 s"):
        services.await_answer(service)
    assert not processes.alive(service.pid, service.began)


@pytest.mark.parametrize("start", [services.start_prefect, services.start_mlflow])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_a_public_address_is_refused_without_authentication(tmp_path: Path, start: object, host: str) -> None:
    with pytest.raises(ValueError, match=f"{host} is open to others: only with authentication"):
        start(tmp_path, host=host)  # type: ignore[operator]
    with pytest.raises(ValueError, match="user:password, both not empty"):
        start(tmp_path, host=host, auth="ann:")  # type: ignore[operator]
    assert list(tmp_path.rglob("*.log")) == []


def test_a_busy_server_is_asked_again_within_the_time() -> None:
    """503 is how Prefect says that SQLite is locked. Any other refusal is told at once."""
    codes = [503, 503, 200, 404] + [503] * 20
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(codes[len(asked) - 1])
            self.end_headers()
            self.wfile.write(b'{"id": 7}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert services.get(url, None, {"a": 1}) == {"id": 7}
        assert asked == [b'{"a": 1}'] * 3
        with pytest.raises(urllib.error.HTTPError, match="404"):
            services.get(url, None, {"a": 1})
        assert len(asked) == 4
        with pytest.raises(urllib.error.HTTPError, match="503"):
            services.get(url, None, {"a": 1}, seconds=2.0)
        assert len(asked) > 5
        server.shutdown()


def test_what_counts_as_loopback() -> None:
    assert processes.is_loopback("127.0.0.1") and processes.is_loopback("127.9.9.9")
    assert processes.is_loopback("::1") and processes.is_loopback("localhost")
    assert not processes.is_loopback("0.0.0.0") and not processes.is_loopback("::")
    assert not processes.is_loopback("10.0.0.1")


def test_a_taken_port_is_refused_with_who_has_it(tmp_path: Path) -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        port = mine.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} is taken by .*pid {os.getpid()}.* --prefect-port"):
            services.start_prefect(tmp_path, port)
    assert not processes.taken("127.0.0.1", port)


def test_what_runs_is_not_changed_silently(tmp_path: Path) -> None:
    before = running.DEFAULTS._replace(lake="/lake")
    prefect = Service("prefect", "http://127.0.0.1:4200/api", 1, tmp_path / "log", 0.0)
    known = {"prefect": prefect, "mlflow": prefect._replace(name="mlflow", url="http://127.0.0.1:5000")}

    def refused(**asked: object) -> str:
        with pytest.raises(ValueError, match="`earloom down` first") as caught:
            running._refuse_changes(known, running.Wanted(**asked), before)  # type: ignore[arg-type]
        return str(caught.value)

    assert refused(prefect_port=4201).startswith("prefect runs at http://127.0.0.1:4200/api with another prefect-port")
    assert refused(mlflow_port=5001).startswith("mlflow runs at http://127.0.0.1:5000 with another mlflow-port")
    assert refused(lake="/other").startswith("mlflow runs at http://127.0.0.1:5000 with another lake")
    assert "with another host" in refused(host="127.0.0.2")
    assert "with another authentication" in refused(auth=PASSWORD)
    running._refuse_changes(known, running.Wanted("127.0.0.1", 4200, 5000, None, "/lake"), before)  # as it is


def test_the_password_is_kept_for_its_owner_and_is_not_changed_under_a_server(tmp_path: Path) -> None:
    assert running._agreed(tmp_path, {}, {}, PASSWORD) == PASSWORD
    file = tmp_path / "services" / "auth"
    assert file.stat().st_mode & 0o777 == 0o600
    assert running.new_auth(tmp_path) == PASSWORD  # `--auth` again
    assert running._agreed(tmp_path, {}, {}, None) is None  # after `down` it is off unless asked for
    up = {"prefect": Service("prefect", "http://127.0.0.1:1/api", 1, tmp_path / "log", 0.0, auth=True)}
    assert running._agreed(tmp_path, up, {}, None) == PASSWORD  # on, while a server that asks for it is to come back
    with pytest.raises(ValueError, match="run with another password"):
        running._agreed(tmp_path, up, up, "ann:another-password")
    (tmp_path / "services" / "mlflow").mkdir()
    (tmp_path / "services" / "mlflow" / "basic-auth.db").touch()
    with pytest.raises(ValueError, match=r"MLflow's users were made with another password: delete .*basic-auth\.db"):
        running._agreed(tmp_path, {}, {}, "ann:another-password")
    for bad in ("ann", "ann:", ":long-enough-password", "ann:11-chars-is"):
        with pytest.raises(ValueError, match="not user:password with a password of 12 characters"):
            running._agreed(tmp_path, {}, {}, bad)
    assert file.read_text().strip() == PASSWORD


def test_mlflow_without_pages_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "mlflow"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("EARLOOM_MLFLOW", str(program))
    with pytest.raises(FileNotFoundError, match=r"no full MLflow: `uv tool install 'mlflow\[auth\]==3\.17\.2'`"):
        services.start_mlflow(tmp_path)
    pages = tmp_path / "lib" / "python3.11" / "site-packages" / "mlflow" / "server" / "js" / "build"
    pages.mkdir(parents=True)
    (pages / "index.html").touch()
    assert services.mlflow_program() == str(program)


@pytest.mark.parametrize("text", ['{"services": [', '{"services": [{"name": "prefect"}]}', '{"services": [1]}'])
def test_a_damaged_state_file_is_named(tmp_path: Path, text: str) -> None:
    (services.folder(tmp_path) / "services.json").write_text(text)
    with pytest.raises(RuntimeError, match=r"services\.json is damaged"):
        running.look(tmp_path)


@pytest.mark.slow
def test_prefect_asks_for_the_password_and_nothing_is_left_after_stop(tmp_path: Path) -> None:
    place = services.folder(tmp_path)
    started = []
    try:
        prefect = services.start_prefect(tmp_path, auth=PASSWORD, host="0.0.0.0", names=["ears.example"])
        started.append(prefect)
        port = prefect.url.split(":")[2].split("/")[0]
        assert prefect.url == f"http://127.0.0.1:{port}/api" and prefect.auth
        flows = f"{prefect.url}/flows/paginate"
        assert [status(f"{prefect.url}/admin/version", auth) for auth in (None, "ann:wrong", PASSWORD)] == [
            401,
            401,
            200,
        ]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            services.get(flows, "ann:wrong", {})
        assert services.get(flows, PASSWORD, {})["count"] == 0
        pages = services.get(f"http://127.0.0.1:{port}/ui-settings")
        assert (pages["api_url"], pages["auth"]) == (f"http://ears.example:{port}/api", "BASIC")
        origins = [f"http://ears.example:{port}", f"http://127.0.0.1:{port}", "http://evil.example"]
        assert [_may_call(flows, origin) for origin in origins] == [True, True, False]

        worker = services.start_worker(tmp_path, "ears", prefect.url, PASSWORD)
        started.append(worker)
        assert services.get(f"{prefect.url}/work_pools/ears", PASSWORD)["type"] == "process"
        assert services.answers(worker, PASSWORD, "ears") and not services.answers(worker, "ann:wrong", "ears")
        assert _told_password(place, [prefect, worker]) == []
    finally:
        for service in reversed(started):
            services.stop(service)
    assert processes.sweep(place) == set()
    assert not processes.taken("0.0.0.0", int(port))


@pytest.mark.slow
def test_mlflow_asks_for_the_password_and_knows_its_names(tmp_path: Path, full_mlflow: None) -> None:
    mlflow = services.start_mlflow(tmp_path, auth=PASSWORD, host="0.0.0.0", names=["ears.example"])
    try:
        port = int(mlflow.url.rsplit(":", 1)[1])
        search = f"{mlflow.url}/api/2.0/mlflow/experiments/search?max_results=5"
        asked = [status(search, auth) for auth in (None, "admin:password1234", "ann:wrong-password", PASSWORD)]
        assert asked == [401, 401, 401, 200]
        named = [status(search, PASSWORD, Host=f"{name}:{port}") for name in ("ears.example", "evil.example")]
        assert named == [200, 403]
        for mine in processes.addresses():
            if ":" not in mine:
                assert (status(search.replace("127.0.0.1", mine), PASSWORD), mine) == (200, mine)
        assert _told_password(services.folder(tmp_path), [mlflow]) == []
    finally:
        services.stop(mlflow)
    assert processes.sweep(services.folder(tmp_path)) == set()
    assert not processes.taken("0.0.0.0", port)


@pytest.mark.slow
def test_mlflow_shows_what_the_lake_registered(tmp_path: Path, full_mlflow: None) -> None:
    """The lake's own sqlite file behind the server: a version registered without it is on its pages, and vice versa."""
    from components.registry.mlflow_registry import register

    model = tmp_path / "lake" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    uri, artifacts = running._stores(str(tmp_path / "lake"))
    assert uri is not None
    register(str(model), "ears", {"wer": 0.25}, {}, "candidate", uri)
    mlflow = services.start_mlflow(tmp_path, backend=uri, artifacts=artifacts)
    try:
        url = f"{mlflow.url}/api/2.0/mlflow/registered-models/alias?name=ears&alias=candidate"
        found = services.get(url)["model_version"]
        assert (found["version"], found["source"]) == ("1", f"local://{model}")
        (model / "config.json").write_text('{"a": 1}')
        assert register(str(model), "ears", {"wer": 0.2}, {}, "champion", mlflow.url).version == "2"
        assert "<title>MLflow</title>" in services.get(mlflow.url)
    finally:
        services.stop(mlflow)


def _may_call(url: str, origin: str) -> bool:
    """Whether a browser would let a page of this origin call the API."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    request = urllib.request.Request(url, headers=headers, method="OPTIONS")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["access-control-allow-origin"] == origin
    except urllib.error.HTTPError as error:
        return error.headers.get("access-control-allow-origin") is not None


def _told_password(place: Path, started: list[Service]) -> list[str]:
    """Where the password can be read by others: command lines, logs, and files that are not the owner's alone."""
    password = PASSWORD.partition(":")[2]
    lines = {}
    for service in started:
        for pid in processes.members(service.pid, service.began, place):
            lines[f"command line of {pid}"] = " ".join(psutil.Process(pid).cmdline())
    logs = {str(service.log): service.log.read_text(errors="replace") for service in started}
    state = place / "services.json"
    more = {str(state): state.read_text()} if state.exists() else {}
    return [where for where, text in (lines | logs | more).items() if password in text or json.dumps(password) in text]
