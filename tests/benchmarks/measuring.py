"""What the benchmarks share: alternating runs, medians, the machine in words, and the verdict.

A number of seconds means little on a machine that others use as well. So the things that are compared take turns in one
process (A B B A), a ratio is the median over neighbouring runs, both absolutes are printed, and a comparison whose base
does not agree with itself by more than a quarter fails rather than passing by luck.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from components.training.fit import device_name

Found = TypeVar("Found")
# Where it is set, each process, and each of Ray's, compiles all that it imports.
BYTECODE = "PYTHONDONTWRITEBYTECODE"
STEADY = 1.25  # how far the base's earlier and later runs may be apart


@dataclass(frozen=True)
class Comparison:
    """Rates (more is better) of a base and of what is compared with it, run by run in the order of `interleaved`."""

    base: Sequence[float]
    other: Sequence[float]

    @property
    def ratio(self) -> float:
        """How many times the base's rate the other's is: the median over pairs of runs that were neighbours."""
        return statistics.median(other / base for base, other in zip(self.base, self.other, strict=True))

    @property
    def drift(self) -> float:
        """The base against itself: runs on the way there against runs on the way back, at least 1."""
        there, back = statistics.median(self.base[::2]), statistics.median(self.base[1::2] or self.base)
        return max(there, back) / min(there, back)


def interleaved(ways: Mapping[str, Callable[[], Found]], rounds: int) -> dict[str, list[Found]]:
    """What each way returns, twice a round: a round runs them in order and then in reverse."""
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in [*ways, *reversed(ways)]:
            found[name].append(ways[name]())
    return found


def middle(values: Sequence[float], form: str = ".1f") -> str:
    """The median, with the least and the most in brackets."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def environment(*paths: str) -> dict[str, str]:
    """That of a side in a process of its own: this one's, with bytecode, and with `paths` to import from."""
    kept = {name: value for name, value in os.environ.items() if name != BYTECODE}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def machine(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str:
    """Processor or card, cores, torch, the precision of matrix products, and how busy the machine is by others."""
    device = device or torch.device("cpu")
    parts = [f"{device_name(device)} of {os.cpu_count()} cores" if device.type == "cpu" else device_name(device)]
    parts.append(f"torch {torch.__version__}")
    if dtype is not None:
        parts.append(str(dtype).removeprefix("torch."))
    return "; ".join([*parts, f"load average {os.getloadavg()[0]:.1f}"])


def verdict(name: str, ratio: float, bar: float, drift: float = 1.0, at_most: bool = False) -> int:
    """Print the last line of a benchmark; returns its exit code, 1 if the bar is missed or the base was not steady."""
    within = ratio <= bar if at_most else ratio >= bar
    said = "met" if within else "MISSED"
    if drift > STEADY:
        said = f"NOT MEASURED: two runs of the base differ by {drift - 1:.0%} (at most {STEADY - 1:.0%}); run it again"
    print(f"{name}: {ratio:.2f}x, bar {'at most' if at_most else 'at least'} {bar:.2f}x: {said}", flush=True)
    return 0 if within and drift <= STEADY else 1
