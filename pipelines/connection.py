"""Ray as a stage reaches it: connected, with the code that was asked for."""

from __future__ import annotations

from typing import Any

from infra import cluster
from pipelines import resources
from pipelines.config import RunConfig
from pipelines.progress import console
from pipelines.shipment import runtime_env


def reach(config: RunConfig) -> Any:
    """Ray, connected; with the code and environment that were asked for, unless a job has given them to us."""
    return cluster.connect(config.ray_address, config.cores(), runtime_env(config, job=False))


def patience(config: RunConfig) -> float:
    """Seconds that a cluster has to get larger; what we start on this machine never does."""
    return 0.0 if is_local(config) else resources.PATIENCE


def is_local(config: RunConfig) -> bool:
    """Whether Ray runs on this machine, started by us."""
    return cluster.address_of(config.ray_address) == cluster.LOCAL


def said(line: str) -> None:
    console.print(f"  {line}", soft_wrap=True)


def alive(ray: Any) -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
