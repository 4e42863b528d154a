"""A model spread over workers, compiled, or with its activations recomputed: what a stage's `Compute` asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from components.training.compute import Compute
from components.training.precision import compute_dtype
from models.contract import SpeechLLM
from models.injection import layers_of


def prepare(model: SpeechLLM, compute: Compute, world: int, unused: bool) -> nn.Module:
    """The module whose forward is the step's loss; `model` itself keeps the parameters.

    Call it after `model.freeze`. `unused`: some batches leave parameters without a gradient (clips without audio).
    FSDP2 changes the parameters of `model` to their shards.
    """
    layers = layers_of(model.llm)  # what is sharded and compiled one by one
    if compute.activation_checkpointing:
        model.llm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if compute.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if world == 1:
        return model
    if not uses_fsdp(compute, world):
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    device = next(model.parameters()).device
    dtype = compute_dtype(device, compute.precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype) if device.type == "cuda" else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    modules: list[nn.Module] = [*layers, model]
    for part in modules:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def uses_fsdp(compute: Compute, world: int) -> bool:
    """Whether parameters are spread over the workers."""
    return world > 1 and compute.parallel == "fsdp"


def synchronise(module: nn.Module, last: bool) -> None:
    """Exchange gradients in the next backward pass only if it is the `last` of a step."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = last
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)


def whole(tensor: Tensor) -> Tensor:
    """A parameter as a plain tensor; every rank must ask for the same ones in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_up(values: list[float], device: torch.device) -> list[float]:
    """Sums of each value over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    exchanged = torch.tensor(values, dtype=torch.float64, device=device if dist.get_backend() == "nccl" else None)
    dist.all_reduce(exchanged)
    return exchanged.tolist()  # type: ignore[no-any-return]


def memory_bytes(device: torch.device) -> dict[str, Any]:
    """Peak memory of the device that tensors took, where it is known."""
    return {"gpu_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
