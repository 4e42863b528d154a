"""How the processes of a training find each other: over the network, or on one machine by a file that only we open.

PyTorch's own way is a store that listens on every address of the machine (TCPStore), without a password and without a
setting for the address. Where all of Ray listens on loopback, all workers are on this machine, and a file does.

Ray Train knows only "env" and "tcp" (`ray.train.torch.TorchConfig.init_method`), so its backend is told otherwise here.
Source: ray/train/torch/config.py, `_TorchBackend.on_start`; torch.distributed, "Shared file-system initialization".
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend

from infra import storage

LOOPBACK = "127.0.0.1"


def torch_config(backend: str) -> TorchConfig:
    """For the cluster that is connected: by a file if it is one machine that listens on loopback alone."""
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return ByFile(backend=backend) if nodes == {LOOPBACK} else TorchConfig(backend=backend)


@dataclass
class ByFile(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """Workers of one machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):  # type: ignore[misc]
    """Each start of the group, also after a worker died, has its own file: what an earlier one left would hang it."""

    def on_start(self, worker_group: Any, backend_config: ByFile) -> None:
        ours = storage.scratch("memory://")  # on this machine, for us alone; what killed groups left there is swept
        place = Path(tempfile.mkdtemp(prefix="group-", dir=ours)) / "store"
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=size,
                    init_method=f"file://{place}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(size)
            ]
        )
        self._place: Path | None = place

    def on_shutdown(self, worker_group: Any, backend_config: ByFile) -> None:
        super().on_shutdown(worker_group, backend_config)
        place = getattr(self, "_place", None)
        if place is not None:
            place.unlink(missing_ok=True)
            place.parent.rmdir()
            self._place = None
