"""Matrix products in bfloat16 where that is right: not for spectra, and on a CPU not for every convolution.

torch 2.13 on a CPU with AMX gives wrong sums, without a word, for grouped convolutions of few channels a group and for
two-dimensional ones whose output is one column wide (oneDNN 3.12, pytorch/pytorch#169688). One-dimensional ones of one
group, or of one for each channel, are right (test_encoder_precision.py); all others stay float32 there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Given = ParamSpec("Given")
GROUPS = 6  # the place of `groups` among the arguments of a convolution


def exact(spectrum: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """A spectrum that stays float32 under autocast: with mel products in bfloat16 its quiet bins would be noise."""

    @wraps(spectrum)
    def outside(*given: Given.args, **named: Given.kwargs) -> Tensor:
        waveform = next(value for value in (*given, *named.values()) if isinstance(value, Tensor))
        with torch.autocast(waveform.device.type, enabled=False):
            return spectrum(*given, **named)

    return outside


@contextmanager
def products(device: torch.device, half: bool | None) -> Iterator[None]:
    """bfloat16 or float32 for what an encoder computes within; with None what the code around it has chosen."""
    wanted = torch.is_autocast_enabled(device.type) if half is None else half
    dtype = torch.bfloat16 if half else torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype, enabled=wanted):
        if wanted and device.type == "cpu":
            with _RightConvolutions():
                yield
        else:
            yield


class _RightConvolutions(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function is torch.conv2d or (function is torch.conv1d and _grouped(args, named)):
            with torch.autocast("cpu", enabled=False):
                return function(*map(_float, args), **{name: _float(value) for name, value in named.items()})
        return function(*args, **named)


def _grouped(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a convolution has groups of several channels."""
    weight = args[1] if len(args) > 1 else named["weight"]
    return bool(named.get("groups", args[GROUPS] if len(args) > GROUPS else 1) != 1 and weight.shape[1] > 1)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
