"""How many tokens fit into memory at a time, and which form of a batch is faster: found by a few probes, then kept.

A probe is a forward and a backward pass over the longest samples of a stage, after one optimiser step, so that moments,
gradients and activations are all there. Memory grows with the tokens of a batch along a line; two probes give it, a
third at the result checks it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import Field

from components.batching.loader import StageData, batch_of
from components.batching.plan import Layout
from components.digest import digest
from components.training import memory
from components.training.compute import Compute
from components.training.step import Stepper, run_step
from infra import storage
from models.batch import Batch
from models.recipe import Declared, Stage

SHARE = 0.92  # of the memory that is free before the first probe
PROBES = (1, 2, 4)  # lengths of the longest sample


class Fit(Declared):
    """What was found for one stage on one kind of device."""

    micro_tokens: int = Field(description="tokens at a time that fit, at most those of a global batch")
    layout: Layout = Field(description="the faster form of a batch")
    tokens_per_second: dict[str, float] = Field(description="of each form")
    bytes_per_token: float
    fixed_bytes: float = Field(description="weights, gradients and moments")
    limit_bytes: float
    device: str


def fit_key(arch: str, parts: Any, stage: Stage, compute: Compute, world: int, device: str, dtype: str) -> str:
    """What a fit depends on: architecture and sizes, what learns, how it is computed, and the device."""
    asked = compute.model_dump(include={"parallel", "activation_checkpointing", "compile"})
    return digest([arch, parts, stage.train, stage.loss, stage.batch_tokens, asked, world, device, dtype])


def find_fit(folder: str, key: str) -> Fit | None:
    """What was found earlier, or None."""
    url = storage.join(folder, f"{key}.json")
    return Fit.model_validate(storage.read_json(url)) if storage.exists(url) else None


def keep_fit(folder: str, key: str, fit: Fit) -> None:
    storage.write_json(storage.join(folder, f"{key}.json"), fit.model_dump(mode="json"))


def fit_stage(data: StageData, stepper: Stepper, budget: int) -> Fit:
    """Probe a stage. Raises OutOfMemory if not even its longest sample fits."""
    device = stepper.device
    longest = int(data.samples.tokens[data.samples.labels > 0].clip(max=data.stage.max_tokens).max())
    forms: tuple[Layout, ...] = ("packed", "bucketed") if data.stage.layout == "auto" else (data.stage.layout,)
    speeds = {form: _speed(data, stepper, min(budget, 4 * longest), form) for form in forms}
    layout = max(forms, key=lambda form: speeds[form])
    limit = SHARE * free_bytes(device)
    points = []
    for tokens in [longest * times for times in PROBES]:
        peak = _peak(stepper, _probe(data, tokens, layout))
        if peak is None:
            break
        points.append((tokens, peak))
    if not points:
        raise memory.OutOfMemory(f"stage {data.stage.name!r}: one sample of {longest} tokens does not fit")
    slope, fixed = _line(points)
    micro = budget if slope <= 0 else int(min(budget, max(longest, (limit - fixed) / slope)))
    while micro > longest and _peak(stepper, _probe(data, micro, layout)) is None:
        micro = max(longest, micro // 2)
    return Fit(
        micro_tokens=micro,
        layout=layout,
        tokens_per_second=dict(speeds),
        bytes_per_token=slope,
        fixed_bytes=fixed,
        limit_bytes=limit,
        device=device_name(device),
    )


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def free_bytes(device: torch.device) -> float:
    """Memory that a stage may take, what it holds already included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _probe(data: StageData, tokens: int, layout: Layout) -> Batch:
    """The longest samples, repeated until they make `tokens` tokens."""
    lengths = np.where(data.samples.labels > 0, data.samples.tokens, 0)
    lengths = np.where(lengths <= data.stage.max_tokens, lengths, 0)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    chosen: list[int] = []
    left = tokens
    while left > 0:
        number = int(order[len(chosen) % len(order)])
        chosen.append(number)
        left -= int(lengths[number])
    return batch_of(data, np.array(chosen), layout)


def _compute(stepper: Stepper, batch: Batch) -> None:
    run_step(stepper, [batch], None, seed=0)


def _speed(data: StageData, stepper: Stepper, tokens: int, layout: Layout) -> float:
    """Real tokens a second on samples of typical lengths; the better of two passes after a warm-up."""
    usable = np.flatnonzero((data.samples.labels > 0) & (data.samples.tokens <= data.stage.max_tokens))
    spread = usable[np.linspace(0, len(usable) - 1, min(len(usable), 256)).astype(int)]
    spread = spread[np.argsort(data.samples.tokens[spread], kind="stable")]
    middle = len(spread) // 2
    count = max(1, int(tokens / max(1.0, float(data.samples.tokens[spread].mean()))))
    batch = batch_of(data, spread[max(0, middle - count // 2) :][:count], layout)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        _compute(stepper, batch)
        seconds.append(time.monotonic() - began)
    return batch.tokens / min(seconds[1:])


def _peak(stepper: Stepper, batch: Batch) -> float | None:
    """Most bytes that were held during a step over the batch; None if they were not to be had."""
    memory.release()
    device = stepper.device
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            _compute(stepper, batch)
            return float(torch.cuda.max_memory_reserved(device))
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident size starts anew
        _compute(stepper, batch)
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        return None


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Slope and offset of the line through the first point and the steepest of the others; a lone point: no slope."""
    (first, low), rest = points[0], points[1:]
    slope = max([0.0, *((high - low) / (tokens - first) for tokens, high in rest)])
    return slope, low - slope * first
