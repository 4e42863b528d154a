"""The moments of an optimiser by the names of the parameters, for checkpoints; whole tensors or shards alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("exp_avg", "exp_avg_sq")


def moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's own state tensors as `moments/<kind>/<parameter>`, like the parameter; `step` is 0-dim float32.

    AdamW makes them at a parameter's first step. Where that is still to come they are made here, as it would: so saving
    and loading see the same names, and loading in place (`Checkpoints.load`) restores the optimiser.
    KeyError for a parameter of the optimiser that the model does not name.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimiser.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimiser.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
                for kind in KINDS:
                    state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            for kind in ("step", *KINDS):
                found[f"moments/{kind}/{names[id(parameter)]}"] = state[kind]
    return found


def restore(model: nn.Module, optimiser: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Copy `saved`, laid out as `moments` gives it for this model on these ranks, into the optimiser.

    KeyError for a name that is missing in `saved`.
    """
    with torch.no_grad():
        for name, tensor in moments(model, optimiser).items():
            tensor.copy_(saved[name])
