"""What each stage asks of a Ray cluster: how much one worker gets, on which machines, and for how many to make room."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from pydantic import Field

from models.recipe import Declared

GB = 10**9
PATIENCE = 900.0  # seconds within which a cluster has to have room
ACCELERATOR = "accelerator_type:"  # Ray's name for 1.0 of each accelerator of a node; 0.001 of it ties work to its kind
LABEL = "ray.io/accelerator-type"

Share = dict[str, float]  # what one worker asks for, in Ray's names


class Resources(Declared):
    """Of one stage, for each of its workers. Zero or nothing leaves it to the stage."""

    cpus: float = Field(0, ge=0, description="CPU cores of each worker; 0 = as the stage needs")
    gpus: float = Field(0, ge=0, description="GPUs of each worker; 0.5 = two share one; 0 = one where there are some")
    accelerator: str | None = Field(
        None, description="kind of GPU as Ray names it, e.g. A100, H100, L4; also where the stage's job runs"
    )
    memory: float = Field(0, ge=0, description="memory of each worker, GB")
    workers: int = Field(
        0, ge=0, description="ingest and cache: so many at most, and room to ask of the autoscaler; 0 = what is there"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="training workers on few nodes or on many; STRICT_ = on one, or each on its own, or not"
    )
    job_cpus: float = Field(0, ge=0, description="CPU cores that the stage's own process takes; with a job address")
    job_memory: float = Field(0, ge=0, description="memory that the stage's own process takes, GB; with a job address")

    @property
    def spread(self) -> bool:
        """Whether workers are to be on different nodes."""
        return self.placement.endswith("SPREAD")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic: classes have a `register`; their instances have none

    class StageResources(Declared):
        """Of every stage."""

        ingest: Resources = Field(default_factory=Resources)
        cache: Resources = Field(default_factory=Resources)
        train: Resources = Field(default_factory=Resources)
        evaluate: Resources = Field(default_factory=Resources)
        register: Resources = Field(default_factory=Resources)


_stage: ContextVar[str | None] = ContextVar("stage", default=None)


@contextmanager
def during(stage: str) -> Iterator[None]:
    """What `asked` gives inside is this stage's."""
    mark = _stage.set(stage)
    try:
        yield
    finally:
        _stage.reset(mark)


def asked(resources: StageResources) -> Resources:
    """What the stage that is running asks for; nothing outside of one."""
    stage = _stage.get()
    return of(resources, stage) if stage else Resources()


def of(resources: StageResources, stage: str) -> Resources:
    found: Resources = getattr(resources, stage)
    return found


def share(wants: Resources, cpus: float, gpus: float = 0) -> Share:
    """What one worker asks for: what the person set, else `cpus` and `gpus`."""
    asks: Share = {"CPU": wants.cpus or cpus}
    if wants.gpus or gpus:
        asks["GPU"] = wants.gpus or gpus
    if wants.memory:
        asks["memory"] = round(wants.memory * GB)
    if wants.accelerator:
        asks[ACCELERATOR + wants.accelerator] = 0.001
    return asks


def options(asks: Share) -> dict[str, Any]:
    """The same as options of `ray.remote`."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    made: dict[str, Any] = {named[name]: amount for name, amount in asks.items() if name in named}
    more = {name: amount for name, amount in asks.items() if name not in named}
    return made | ({"resources": more} if more else {})


def room(nodes: Sequence[Mapping[str, float]], asks: Share) -> int:
    """How many workers fit, each whole on one node, were the cluster empty."""
    return sum(min(int(node.get(name, 0) / amount + 1e-9) for name, amount in asks.items() if amount) for node in nodes)


def totals(ray: Any) -> list[dict[str, float]]:
    """What each node that is alive has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def told(asks: Mapping[str, float]) -> str:
    """For a person: `2 CPU, 1 GPU, A100, 16 GB memory`."""
    words = []
    for name, amount in asks.items():
        if name.startswith(ACCELERATOR):
            words.append(name.removeprefix(ACCELERATOR))
        elif name == "memory":
            words.append(f"{amount / GB:.4g} GB memory")
        elif name in ("CPU", "GPU"):
            words.append(f"{amount:g} {name}")
    return ", ".join(words)


def wait_for_room(ray: Any, asks: Share, workers: int, say: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Return once the cluster is large enough for `workers`; says at once that it is not, and what is missing.

    RuntimeError after `patience` seconds: Ray would wait for ever. Work of others is not counted, it ends some day.
    """
    end, spoken = time.monotonic() + patience, False
    while (there := room(totals(ray), asks)) < workers:
        largest = "; ".join(told(node) for node in totals(ray)) or "nothing"
        line = (
            f"{workers} worker(s) are wanted, each asks for {told(asks)} of a cluster that has room for {there} (its "
            f"nodes: {largest})"
        )
        if time.monotonic() > end:
            raise RuntimeError(f"{line}: set resources.… or workers=… to what there is, or add nodes")
        if not spoken:
            say(f"waiting for nodes, {patience / 60:.0f} min at most: {line}")
            spoken = True
        time.sleep(2.0)


@contextmanager
def hinted(wants: Resources, asks: Share, workers: int) -> Iterator[None]:
    """Tell the autoscaler what is about to be asked for, and that it is not needed any more.

    Only where the person asked for something: a cluster keeps one such request, and ours would replace another's. It
    stays behind if this process is killed, until the next one.
    """
    if wants == Resources() or not workers:
        yield
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(asks)] * workers)
    try:
        yield
    finally:
        request_resources(bundles=[])
