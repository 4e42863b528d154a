"""Addresses, tokens, and a head that is away for a moment: an HTTP server of our own that answers as a head does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import cluster
from infra.environment import prepare
from infra.jobs import OPEN, Gone, Jobs, Unreachable, follow, is_job_address, refuse_open, token
from infra.processes import addresses

prepare()
VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", OPEN)
Answer = tuple[int, Any]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def head(answer: Callable[[str, str, str], Answer]) -> Iterator[str]:
    """URL of a server that answers `(method, path, authorization)` with a status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, value = answer(self.command, self.path, self.headers.get("Authorization") or "")
            text = value if isinstance(value, str) else json.dumps(value)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def job(status: str, name: str = "a-1", **more: Any) -> dict[str, Any]:
    return {"submission_id": name, "status": status, "message": None, "type": "SUBMISSION"} | more


@pytest.mark.parametrize(
    "address",
    [
        *("local", "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379", "ray://head:10001", "http://127.0.0.1:8265"),
        *("https://ray.example.org", "https://ray.example.org/cluster-a", "http://[::1]:8265/"),
    ],
)
def test_addresses_that_are_understood(address: str) -> None:
    assert cluster.check_address(address) == address.rstrip("/")
    assert is_job_address(address) == address.startswith("http")


@pytest.mark.parametrize("address", ["head", "ftp://head:1", "ray://head", "head:port", "http://", "http://a b:1"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"no Ray address: it is local, auto, host:port"):
        cluster.check_address(address)


def test_the_environment_s_address_is_taken_only_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.address_of(None) == "10.0.0.1:6379"
    assert cluster.address_of("local") == "local"
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster.address_of(None) == "local"


def test_another_machine_without_a_token_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265", "https://203.0.113.7:8265"):
        refuse_open(address)
    for address in (
        "http://203.0.113.7:8265",
        "203.0.113.7:6379",
        "ray://203.0.113.7:10001",
        "http://[2001:db8::1]:8265",
    ):
        with pytest.raises(ValueError, match=r"another machine and there is no token.*RAY_AUTH_TOKEN") as caught:
            refuse_open(address)
        assert "\n" not in str(caught.value)
    for ours in addresses():  # a head of this machine has the first of them, where nobody said otherwise
        refuse_open(f"[{ours}]:6379" if ":" in ours else f"{ours}:6379")
    monkeypatch.setenv(OPEN, "1")
    refuse_open("http://203.0.113.7:8265")
    monkeypatch.delenv(OPEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-mine")
    refuse_open("http://203.0.113.7:8265")


def test_the_token_is_found_where_ray_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-the-home\n")
    assert token() is None  # not without its mode: nobody asked to send it
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert token() == "of-the-home"
    (tmp_path / "file").write_text("of-a-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert token() == "of-a-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    assert token() == "of-the-environment"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no Ray token in .*nothing"):
        token()


def test_requests_are_tried_again_and_carry_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-mine")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # the address that was given is the one that is asked
    seen: list[str] = []

    def answer(method: str, path: str, authorization: str) -> Answer:
        seen.append(authorization)
        return (503, "starting") if len(seen) < 2 else (200, [job("RUNNING"), job("FAILED", "b-1")])

    with head(answer) as url:
        (found,) = Jobs(url).find("a-")
    assert (found.id, found.status, found.ended) == ("a-1", "RUNNING", False)
    assert seen == ["Bearer a-token-of-mine"] * 2


def test_a_head_that_never_answers_is_given_up_and_the_line_says_that_the_job_goes_on() -> None:
    with head(lambda *_: (503, "away")) as url, pytest.raises(Unreachable, match=r"no answer.*a job that runs there"):
        Jobs(url, patience=0.3).state("a-1")


@pytest.mark.parametrize(("status", "words"), [(401, "asks for a token"), (403, "does not take this token")])
def test_a_missing_or_wrong_token_is_said_at_once(status: int, words: str) -> None:
    tries: list[str] = []

    def answer(method: str, path: str, _: str) -> Answer:
        tries.append(path)
        return status, "no"

    with head(answer) as url, pytest.raises(PermissionError, match=rf"{words}: set RAY_AUTH_MODE=token"):
        Jobs(url).state("a-1")
    assert len(tries) == 1


def test_of_two_that_submit_the_same_id_one_is_told_that_it_is_there() -> None:
    taken: list[str] = []

    def answer(method: str, path: str, _: str) -> Answer:
        if (method, path) != ("POST", "/api/jobs/"):
            return 200, {"ray_version": "2.60.0"}
        taken.append(path)
        if len(taken) > 1:
            return 400, "Traceback …\nValueError: Job with submission_id a-1 already exists. Please use a different …"
        return 200, {"job_id": "a-1", "submission_id": "a-1"}

    with head(answer) as url:
        jobs = Jobs(url)
        assert [jobs.submit("a-1", "true", {}), jobs.submit("a-1", "true", {})] == [True, False]


def test_a_log_is_followed_from_where_it_was_left_in_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.jobs.POLL", 0.01)
    log = "one\ntwo\nthree\nfour"
    lengths = iter([5, 9, 9, len(log)])
    states: list[int] = []

    def answer(method: str, path: str, _: str) -> Answer:
        if path.endswith("/logs"):
            return 200, {"logs": log[: next(lengths)]}
        states.append(1)
        return 200, job("RUNNING" if len(states) < 4 else "SUCCEEDED")

    parts: list[str] = []
    with head(answer) as url:
        end, seen = follow(Jobs(url), "a-1", parts.append, seen=4)
    assert (end.status, seen) == ("SUCCEEDED", len(log))
    assert parts == ["two\n", "three\nfour"]


def test_a_job_that_the_head_does_not_know_is_gone() -> None:
    with head(lambda *_: (404, "Job a-1 does not exist")) as url, pytest.raises(Gone, match="knows nothing of the job"):
        Jobs(url).state("a-1")
