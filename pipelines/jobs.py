"""A stage as a Ray job: the one place where it is decided that a stage runs on another machine than its flow.

The id of a job says what work it is, so that the same work is found again: by a flow that was killed and started
again, and by a second one that was started beside it. What the stage made comes from the lake, never from the log.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from components.digest import digest
from components.schema import StageReport
from infra import cluster, storage
from infra.jobs import Gone, Job, Jobs, follow, is_job_address
from infra.stores import shown
from pipelines.config import RunConfig
from pipelines.job_main import RESULTS, SETTINGS, SHOWN
from pipelines.progress import console
from pipelines.resources import GB, LABEL, during, of
from pipelines.shipment import runtime_env
from pipelines.workspace import remember, workspace

LOSSES = 4  # nodes that a job may lose, its own machine among them, before the flow fails
NODE_LOST = ("JOB_SUPERVISOR_ACTOR_DIED",)
NOTE_SECONDS = 5.0  # between two notes of how far the log was shown; so much may be shown twice after a kill
STOP_PATIENCE = 20.0  # seconds that a flow which is being cancelled tries to reach the head

# What each stage depends on, besides what those before it do. Settings of later stages make no other job of it.
DEPENDS = {
    "ingest": ("data", "lake", "dataset", "per_shard", "ingest", "seed"),
    "cache": ("arch", "preset", "set", "features"),
    "train": (),
    "evaluate": ("split", "eval_clips", "baseline_clips", "eval_task", "eval_options"),
    "register": ("name", "alias", "tracking_uri"),
}
# How it is computed and where, which changes nothing of what comes out.
HOW = ("workers", "compute", "cpus", "ray_address", "ray_working_dir", "ray_env", "resources")
ONLY_HERE = {"ray_address", "ray_working_dir", "ray_env"}  # not for the stage inside of the job


def run_stage(
    stage: str, config: RunConfig, here: Callable[[], StageReport | Sequence[StageReport]]
) -> list[StageReport]:
    """`here()`, with the stage's resources; or the stage as a job, if the address of the cluster is one for jobs."""
    address = cluster.address_of(config.ray_address)
    if is_job_address(address):
        return _Stage(stage, config, Jobs(address)).run()
    with during(stage):
        made = cluster.interruptibly(here)
    return [made] if isinstance(made, StageReport) else list(made)


def work_id(stage: str, config: RunConfig) -> str:
    """The beginning of the ids of all attempts at this work: `earloom-train-0123456789abcdef-`."""
    names = [name for one in list(DEPENDS)[: list(DEPENDS).index(stage) + 1] for name in DEPENDS[one]]
    settings = config.model_dump(mode="json", include=set(names))
    return f"earloom-{stage}-{digest([settings, _version()])[:16]}-"


def _version() -> str:
    with suppress(PackageNotFoundError):
        return version("earloom")
    return ""


@dataclass
class _Stage:
    """One stage of one flow, on its way through jobs."""

    stage: str
    config: RunConfig
    jobs: Jobs
    name: str = ""  # of the job that is followed, from before it is submitted

    def run(self) -> list[StageReport]:
        last = self._last()
        if last is not None and last.status == "SUCCEEDED":
            reports = self._kept(last.id)
            if reports is not None:
                _say(f"{self.stage}: done by the job {last.id}")
                return reports
        for _ in range(LOSSES + 1):
            try:
                job = self._attempt()
            except Gone as error:
                _say(f"{error}; {self.stage} is submitted again")
                continue
            if job.status == "SUCCEEDED":
                return self._reports(job.id)
            if job.error not in NODE_LOST:
                raise RuntimeError(self._failure(job))
            _say(f"the job {job.id} was lost with its node; {self.stage} goes on in another one")
        raise RuntimeError(
            f"{self.stage} lost {LOSSES + 1} jobs to nodes that went: start the same command again, what is finished "
            "is kept"
        )

    # ---- which job ------------------------------------------------------------------------------------------------

    def _last(self) -> Job | None:
        found = self.jobs.find(work_id(self.stage, self.config))
        return max(found, key=lambda job: _number(job.id), default=None)

    def _attempt(self) -> Job:
        """Follow the job that runs, or a new one; stops it if the flow is cancelled."""
        try:
            seen = self._take()
            return self._follow(self.name, seen)
        except BaseException as error:
            # Not for an Exception: a head that does not answer, or a lake, is no reason to end work that goes on.
            if self.name and not isinstance(error, Exception):
                self._stop(self.name)
            raise

    def _take(self) -> int:
        """Set the name of the job to follow; returns how much of its log an earlier flow has shown."""
        prefix = work_id(self.stage, self.config)
        last = self._last()
        if last is not None and not last.ended:
            self.name = last.id
            _say(f"{self.stage}: attached to the job {last.id} ({last.status.lower()}); it was not started twice")
            return self._seen(last.id)
        self.name = name = f"{prefix}{_number(last.id) + 1 if last else 1}"
        folder = self._folder(name)
        settings = self.config.model_dump(mode="json", exclude=ONLY_HERE)
        storage.write_json(storage.join(folder, SETTINGS), settings)
        entry = shlex.join(["python", "-m", "pipelines.job_main", self.stage, folder])
        mine = self.jobs.submit(name, entry, runtime_env(self.config, job=True), **self._requests())
        if mine:
            self._note(name, 0)  # a job of a cluster that is gone may have had this name
        where = f"job {name} at {shown(self.jobs.address)}"
        _say(f"{self.stage}: {where}" if mine else f"{self.stage}: attached to the {where}, which another flow started")
        return 0 if mine else self._seen(name)

    def _requests(self) -> dict[str, Any]:
        """What the stage's own process takes; with a kind of GPU it runs where such a one is."""
        wants = of(self.config.resources, self.stage)
        asks: dict[str, Any] = {}
        if wants.job_cpus:
            asks["entrypoint_num_cpus"] = wants.job_cpus
        if wants.job_memory:
            asks["entrypoint_memory"] = round(wants.job_memory * GB)
        if wants.accelerator:
            asks["entrypoint_label_selector"] = {LABEL: wants.accelerator}
        return asks

    # ---- while it runs ----------------------------------------------------------------------------------------------

    def _follow(self, name: str, seen: int) -> Job:
        noted, upto = time.monotonic(), seen

        def show(text: str) -> None:
            nonlocal noted, upto
            upto += len(text)
            _tell(text)
            if time.monotonic() - noted > NOTE_SECONDS:
                self._note(name, upto)
                noted = time.monotonic()

        try:
            return follow(self.jobs, name, show, seen)[0]
        finally:
            self._note(name, upto)

    def _stop(self, name: str) -> None:
        self.jobs.patience = STOP_PATIENCE
        try:
            job = self.jobs.stop(name)
        except (RuntimeError, OSError, ValueError) as error:
            _say(f"the job {name} could not be stopped: {error}")
        else:
            _say(f"the job {name} is {job.status.lower() if job else 'gone'}")

    def _seen(self, name: str) -> int:
        with suppress(OSError, ValueError, KeyError):
            return int(storage.read_json(storage.join(self._folder(name), SHOWN))["characters"])
        return 0

    def _note(self, name: str, characters: int) -> None:
        with suppress(OSError):  # a log that is shown twice is better than a flow that ends
            storage.write_json(storage.join(self._folder(name), SHOWN), {"characters": characters})

    # ---- what came of it --------------------------------------------------------------------------------------------

    def _folder(self, name: str) -> str:
        return storage.join(self.config.lake, "jobs", name)

    def _results(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = storage.read_json(storage.join(self._folder(name), RESULTS))
        return found

    def _reports(self, name: str) -> list[StageReport]:
        results = self._results(name)
        if results.get("base"):
            remember(self.config, results["base"])
        return [StageReport.model_validate(report) for report in results["reports"]]

    def _kept(self, name: str) -> list[StageReport] | None:
        """Of a job that succeeded before; None if its data or what it made have changed: it has to run again."""
        try:
            results = self._results(name)
            same = results["version"] == workspace(self.config).version
            there = all(storage.fingerprint(url) == mark for url, mark in results["artefacts"].items())
        except (OSError, ValueError, LookupError):
            return None
        if not (same and there):
            return None
        old = {"state": "up to date", "done": 0, "seconds": 0.0}
        return [one.model_copy(update=old | {"reused": one.done + one.reused}) for one in self._reports(name)]

    def _failure(self, job: Job) -> str:
        if job.status == "STOPPED":
            return f"the job {job.id} of {self.stage} was stopped; the same command goes on with what is finished"
        with suppress(OSError, ValueError, KeyError):
            return f"{self._results(job.id)['error']} (job {job.id})"
        lines = [line.strip() for line in job.message.splitlines() if line.strip()]
        return f"the job {job.id} of {self.stage} failed: {shown(lines[-1]) if lines else job.error}"


def _number(name: str) -> int:
    end = name.rpartition("-")[2]
    return int(end) if end.isdigit() else 0


def _say(line: str) -> None:
    console.print(f"  {line}", markup=False, soft_wrap=True)
    _log(line)


def _tell(text: str) -> None:
    """Lines of the job, on the terminal and in the log of the Prefect run."""
    for line in shown(text).splitlines():
        if line.strip():
            console.print(f"  | {line}", markup=False, soft_wrap=True)
            _log(line)


def _log(line: str) -> None:
    """Straight to Prefect's own handler: its logger is quiet on our terminal, and would be on the server too."""
    from prefect.exceptions import MissingContextError
    from prefect.logging import get_run_logger

    try:
        adapter = get_run_logger()
    except MissingContextError:
        return
    target: logging.Logger = adapter.logger
    _, more = adapter.process("", {})
    record = target.makeRecord(target.name, logging.INFO, __file__, 0, line, (), None, extra=more.get("extra"))
    for handler in target.handlers:
        handler.handle(record)
