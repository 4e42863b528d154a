"""Ray Jobs at the address of a cluster's head: submit one, find it again, follow its log, stop it.

A job outlives the process that submitted it. Whoever knows its id can go on where that one left off, and of two that
submit the same id at once one is refused, so that an id is one job.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from infra.processes import is_loopback
from infra.stores import shown

T = TypeVar("T")

CONNECT, SILENCE = 5.0, 60.0  # seconds in which a connection stands, and in which the head says something
PATIENCE = 600.0  # seconds that a head may not answer, as when it is moved to another machine
SLOWEST = 20.0  # seconds between two tries of a request
POLL = 1.0  # seconds between two looks at a job; longer with a long log, for Ray sends all of it each time
LOG_PACE = 2e6  # bytes of log a second of that wait
STOPPING = 30.0  # seconds in which a stopped job has to end; Ray itself kills it after three

OPEN = "EARLOOM_RAY_UNAUTHENTICATED"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """What the head says of a job."""

    id: str
    status: str  # PENDING, RUNNING or one of ENDED
    message: str = ""
    error: str = ""  # Ray's kind of error, such as JOB_SUPERVISOR_ACTOR_DIED

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Unreachable(RuntimeError):
    """The head has not answered for `PATIENCE`: nobody knows whether the job goes on."""


class Gone(LookupError):
    """The head answers and does not know the job: it was started anew."""


# ---- addresses and tokens -------------------------------------------------------------------------------------------


def is_job_address(address: str | None) -> bool:
    """Whether work for this address is submitted as a job: that of a head's dashboard, `http://` or `https://`."""
    return bool(address) and str(address).startswith(("http://", "https://"))


def token() -> str | None:
    """The person's token, where Ray looks for it: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    The last one only with RAY_AUTH_MODE=token. ValueError for that mode without a token, or a file that is not there.
    """
    given, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    asked = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if given:
        return given.strip()
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if not path and not asked:
        return None
    try:
        return file.read_text().strip()
    except OSError as error:
        raise ValueError(
            f"no Ray token in {file} ({error.strerror}): set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it"
        ) from None


def refuse_open(address: str) -> None:
    """ValueError for a plain address of another machine without a token: whoever reaches such a head runs code there.

    `https://` is left to its proxy. Set `EARLOOM_RAY_UNAUTHENTICATED=1` where the network itself is private.
    """
    if address.startswith("https://") or token() or os.environ.get(OPEN) == "1":
        return
    host = address.rpartition("://")[2].rpartition("@")[2].partition("/")[0]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not (is_loopback(host) or _is_ours(host)):
        raise ValueError(
            f"{shown(address)} is another machine and there is no token for it: set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN as on the cluster, or {OPEN}=1 if only trusted people reach that network"
        )


def _is_ours(host: str) -> bool:
    """Whether this machine has the address: a Ray that was started here without one is known by its first."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


# ---- jobs -----------------------------------------------------------------------------------------------------------


class Jobs:
    """The jobs of one cluster. Every request has a time limit and is tried again while the head does not answer.

    Raises `Unreachable` after `patience` seconds, PermissionError for a wrong or missing token, ValueError for what
    the head refuses.
    """

    def __init__(self, address: str, patience: float = PATIENCE) -> None:
        refuse_open(address)
        self.address, self.patience = address.rstrip("/"), patience
        self.client = _client(self.address)

    def find(self, prefix: str) -> list[Job]:
        """Jobs whose id begins with `prefix`, in no order."""
        rows = self._ask(lambda: self._get("/api/jobs/"))
        return [_job(row) for row in rows or [] if str(row.get("submission_id") or "").startswith(prefix)]

    def state(self, name: str) -> Job:
        """What there is to say of a job; `Gone` if the head does not know it."""
        row = self._ask(lambda: self._get(f"/api/jobs/{name}"))
        if row is None:
            raise Gone(f"the cluster at {shown(self.address)} knows nothing of the job {name}: it was started anew")
        return _job(row)

    def submit(self, name: str, entrypoint: str, runtime_env: dict[str, Any], **requests: Any) -> bool:
        """Start a job, with Ray's `entrypoint_num_cpus` and the like; False if there is one with this id already.

        A local `working_dir` is sent first. The answer to a submission that did arrive may be lost: the second try
        is then refused, and the job is there.
        """

        def send() -> bool:
            try:
                self.client.submit_job(
                    submission_id=name, entrypoint=entrypoint, runtime_env=runtime_env, metadata={}, **requests
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    return False
                raise
            return True

        return self._ask(send)

    def log(self, name: str) -> str | None:
        """All that the job has written; None where it cannot be had now, as after the loss of its node."""
        try:
            found = self._get(f"/api/jobs/{name}/logs")
        except PermissionError:
            raise
        except Exception:  # noqa: BLE001 the state of the job says whether the head is there
            return None
        return None if found is None else str(found["logs"])

    def stop(self, name: str) -> Job | None:
        """End a job and wait until it has; None if the head does not know it."""
        self._ask(lambda: self.client._do_request("POST", f"/api/jobs/{name}/stop"))
        end = time.monotonic() + STOPPING
        while True:
            try:
                job = self.state(name)
            except Gone:
                return None
            if job.ended or time.monotonic() > end:
                return job
            time.sleep(0.2)

    def _get(self, path: str) -> Any:
        """The JSON at a path; None for a 404."""
        answer = self.client._do_request("GET", path)
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            self.client._raise_error(answer)
        return answer.json()

    def _ask(self, action: Callable[[], T]) -> T:
        end, wait = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return action()
            except Exception as error:  # noqa: BLE001 requests, Ray and our own raise what they like
                permanent = _permanent(error, self.address)
                if permanent is not None:
                    raise permanent from None
                if time.monotonic() + wait > end:
                    raise Unreachable(
                        f"no answer from {shown(self.address)} for {self.patience:.0f} s ({_reason(error)}); a job "
                        "that runs there goes on: start the same command again when the cluster can be reached"
                    ) from None
            time.sleep(wait * (0.5 + random.random()))
            wait = min(SLOWEST, 2 * wait)


def follow(jobs: Jobs, name: str, show: Callable[[str], None], seen: int = 0) -> tuple[Job, int]:
    """Hand each line that a job writes to `show` until it ends; returns its last state and how much was shown.

    `seen` characters of the log are left out. `show` is called with whole lines only, but for the very last.
    """
    while True:
        job = jobs.state(name)  # before the log: the log of a job that has ended is then complete
        text = jobs.log(name) or ""
        upto = len(text) if job.ended else text.rfind("\n") + 1
        if upto > seen:
            show(text[seen:upto])
            seen = upto
        if job.ended:
            return job, seen
        time.sleep(POLL + len(text) / LOG_PACE)


def _client(address: str) -> Any:
    import ray
    from ray.dashboard.modules.dashboard_sdk import SubmissionClient
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # each file that it leaves out is a line else
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's own, which packs and sends a working directory, with time limits and with no other address."""

        def __init__(self) -> None:
            # Not JobSubmissionClient's: it would go to $RAY_ADDRESS, whatever address it is given.
            self._client_ray_version = ray.__version__
            key = token()
            SubmissionClient.__init__(self, address, headers={"Authorization": f"Bearer {key}"} if key else None)

        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, **({"timeout": (CONNECT, SILENCE)} | more))

    return Client()


def _job(row: dict[str, Any]) -> Job:
    return Job(row["submission_id"], row["status"], row.get("message") or "", row.get("error_type") or "")


def _permanent(error: Exception, address: str) -> Exception | None:
    """What to raise at once; None for a fault that may pass."""
    if type(error).__name__ == "AuthenticationError":
        wrong = "does not take this token" if "failed" in str(error) else "asks for a token"
        return PermissionError(
            f"the cluster at {shown(address)} {wrong}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) as on the cluster"
        )
    if isinstance(error, PermissionError | FileNotFoundError | TypeError | KeyError):
        return error
    status = re.search(r"status code (\d+)", str(error))
    if isinstance(error, ValueError) and not hasattr(error, "request"):
        return error
    if status and 400 <= int(status[1]) < 500 and status[1] not in ("408", "429"):
        return ValueError(f"the cluster at {shown(address)} refuses: {_reason(error)}")
    return None


def _reason(error: Exception) -> str:
    """The last line of an error, where Ray puts a traceback of the head's before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[-1] if lines else type(error).__name__)
