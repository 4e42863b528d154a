"""One stage of a recipe: the training loop, without knowing who scheduled it.

Works alone, in a notebook, in a test or as one of several Ray Train workers: what it needs from the scheduler is
the small `Scheduler` protocol. Killed at any moment, the next call goes on from the newest complete checkpoint and sees
the batches that the killed one would have seen, on the same number of workers or another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.batching.loader import StageData, load_step, prefetched
from components.training import memory
from components.training.checkpoint import Checkpoints
from components.training.compute import Compute
from components.training.faults import BadBatches
from components.training.history import join_segments, write_segment
from components.training.objective import objective_of
from components.training.optimiser_state import moments
from components.training.optimisers import build_optimiser, set_rates
from components.training.parallel import add_up, prepare, uses_fsdp, whole
from components.training.precision import compute_dtype
from components.training.shards import Damaged
from components.training.step import Outcome, Stepper, batch_loss, run_step, step_seed
from components.training.watch import Watch
from components.training.weights import save_tensors
from infra import storage
from models.batch import Batch
from models.contract import SpeechLLM
from models.recipe import Stage


class Scheduler(Protocol):
    """What training needs from whoever runs it."""

    rank: int
    world: int

    def report(self, metrics: dict[str, Any]) -> None:
        """Called after each step on every rank; must not block for long."""


class Alone:
    """The scheduler of a single process."""

    rank = 0
    world = 1

    def report(self, metrics: dict[str, Any]) -> None:
        return None


@dataclass
class StageLoop:
    """What the steps of a stage share. `held_out` is the dev split, for stages that stop on a plateau."""

    stage: Stage
    data: StageData
    model: SpeechLLM
    tokenizer: PreTrainedTokenizerBase
    url: str
    seed: int
    scheduler: Scheduler
    compute: Compute = field(default_factory=Compute)
    held_out: StageData | None = None


@dataclass
class Place:
    """Where a stage is: all that a checkpoint holds besides tensors. Random numbers follow from seed and step."""

    step: int = 0
    seconds: float = 0.0  # of training so far, over all attempts
    skipped: int = 0  # batches without a finite loss
    best: float | None = None  # lowest loss on the dev split
    waited: int = 0  # checkpoints since then
    over: bool = False  # a stop rule was met

    @classmethod
    def read(cls, state: dict[str, Any]) -> Place:
        return cls(**{f.name: state[f.name] for f in fields(cls)})


def train_stage(loop: StageLoop, trained_before: list[str]) -> list[str]:
    """Train the stage's parameter groups to its end and publish `<url>/weights.safetensors`.

    Returns the names of all parameters trained so far, those of earlier stages (`trained_before`) included.
    Raises FloatingPointError when more batches than `stage.skip_batches` had no finite loss, OutOfMemory when not even
    one sample fits, ValueError for a stage that stops on a plateau without held-out samples to see it by.
    """
    if loop.stage.patience is not None and (loop.held_out is None or not len(loop.held_out.plan)):
        raise ValueError(
            f"stage {loop.stage.name!r} stops on a plateau and needs clips of the dev split; there are none: add some, "
            "or leave patience out"
        )
    learning = loop.model.freeze(loop.stage.train)
    trained = sorted({*trained_before, *learning})
    stepper = make_stepper(loop)
    checkpoints = Checkpoints(storage.join(loop.url, "checkpoints"), loop.scheduler.rank, loop.scheduler.world)
    place = _resume(checkpoints, _tensors(loop.model, stepper, trained))
    loop.model.train()
    lines: list[dict[str, Any]] = []
    for line in _steps(loop, stepper, place):
        lines.append(line)
        place.over = place.step == len(loop.data.plan) or _time_is_up(loop, place)
        if place.over or place.step % loop.stage.checkpoint_every == 0:
            score = _check(loop, stepper, place, lines)
            if loop.scheduler.rank == 0:
                write_segment(loop.url, place.step, lines)
            checkpoints.save(place.step, _tensors(loop.model, stepper, trained), asdict(place), score)
            lines = []
        if place.over:
            break
    checkpoints.wait()
    if loop.stage.patience is not None and (best := checkpoints.best()) is not None:
        checkpoints.load(best, _tensors(loop.model, stepper, trained))
    loop.model.eval()
    parameters = dict(loop.model.named_parameters())
    final = {name: whole(parameters[name]) for name in trained}
    if loop.scheduler.rank == 0:
        join_segments(loop.url, place.step)
        save_tensors(storage.join(loop.url, "weights.safetensors"), final)
    return trained


def make_stepper(loop: StageLoop) -> Stepper:
    """What computes the steps of a stage; call it after `model.freeze`."""
    device = next(loop.model.parameters()).device
    unused = not bool(loop.data.samples.audio.all())
    module = prepare(loop.model, loop.compute, loop.scheduler.world, unused)
    return Stepper(
        module=module,
        loss=partial(module, objective=objective_of(loop.stage, loop.data, loop.tokenizer)),
        optimiser=build_optimiser(loop.model, loop.stage),
        device=device,
        dtype=compute_dtype(device, loop.compute.precision),
        clip=loop.stage.optimiser.clip,
        rank=loop.scheduler.rank,
        world=loop.scheduler.world,
    )


def _tensors(model: SpeechLLM, stepper: Stepper, trained: list[str]) -> dict[str, Tensor]:
    """What a checkpoint holds: everything trained so far, and the optimiser's moments."""
    parameters = dict(model.named_parameters())
    weights = {f"weights/{name}": parameters[name].detach() for name in trained}
    return weights | moments(model, stepper.optimiser)


def _resume(checkpoints: Checkpoints, tensors: dict[str, Tensor]) -> Place:
    """Put the newest complete checkpoint back, or the one before if that is damaged.

    Raises Damaged if there are some and none can be read: to begin again would hide the loss of the work.
    """
    complete = checkpoints.complete()
    for folder in complete:
        try:
            return Place.read(checkpoints.load(folder, tensors))
        except Damaged as error:
            logging.getLogger(__name__).warning("%s", error)
            if folder == complete[-1]:
                raise
    return Place()


def _steps(loop: StageLoop, stepper: Stepper, place: Place) -> Iterator[dict[str, Any]]:
    """Train step by step, moving `place` on; yields the line of metrics of each step."""
    stage, scheduler = loop.stage, loop.scheduler
    micro = memory.MicroBatch(loop.url, loop.compute.micro_tokens or None)
    even = uses_fsdp(loop.compute, scheduler.world)

    def load(step: int) -> tuple[list[Batch], int | None]:
        tokens = micro.tokens
        return load_step(loop.data, step, scheduler.rank, scheduler.world, tokens, even), tokens

    bad = BadBatches(loop.url, stage, place.skipped)
    steps = len(loop.data.plan)
    todo = range(place.step, place.step if place.over else steps)
    watch = Watch(loop.model, stage, stepper.device, stepper.dtype)
    for step, (batches, made_for) in watch.waiting(prefetched(load, todo)):
        rate = set_rates(stepper.optimiser, stage, step, steps)
        outcome = _fitting_step(loop, stepper, micro, step, batches, made_for)
        place.step, place.seconds = step + 1, place.seconds + watch.step_seconds()
        if not outcome.finite:
            bad.skip(step, loop.data.keys(step), outcome, scheduler.rank)
            place.skipped = bad.count
        line = _line(loop, step, outcome, rate) | watch.measured(outcome, len(loop.data.plan.batch(step)))
        scheduler.report(line | {"steps": steps})
        yield line


def _fitting_step(
    loop: StageLoop, stepper: Stepper, micro: memory.MicroBatch, step: int, batches: list[Batch], made_for: int | None
) -> Outcome:
    """One step; when memory runs out, the same global batch again in smaller pieces. `made_for`: tokens at a time.

    With several workers the others are in the middle of an exchange: this one notes the smaller size and raises, and
    the scheduler starts all of them again from the newest checkpoint.
    """
    scheduler = loop.scheduler
    while True:
        try:
            return run_step(stepper, batches, loop.data.labels(step), step_seed(loop.seed, step))
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            largest = max(batch.ids.numel() for batch in batches)
        stepper.optimiser.zero_grad(set_to_none=True)
        memory.release()
        if made_for == micro.tokens:  # else the batches were made ahead, before the last time that memory ran out
            micro.halve(largest, step)
        if scheduler.world > 1:
            raise memory.OutOfMemory(f"step {step}: out of memory; starting again with {micro.tokens} tokens at a time")
        made_for = micro.tokens
        batches = load_step(loop.data, step, scheduler.rank, scheduler.world, made_for)


def _line(loop: StageLoop, step: int, outcome: Outcome, rate: float) -> dict[str, Any]:
    batch = loop.data.plan.batch(step)
    return {
        "stage": loop.stage.name,
        "step": step,
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "lr": rate,
        "gradient_norm": outcome.norm if math.isfinite(outcome.norm) else None,
        "tokens": outcome.tokens,
        "labels": outcome.labels,
        "padding": 1.0 - outcome.tokens / max(1, outcome.positions),
        "seconds_mean": float(loop.data.samples.seconds[batch].mean()),
        "epoch": int(loop.data.plan.epochs[step]),
        "tasks": loop.data.shares(step),
    }


def _time_is_up(loop: StageLoop, place: Place) -> bool:
    """Whether the stage's seconds are used up; all ranks decide alike."""
    if loop.stage.max_seconds is None:
        return False
    device = next(loop.model.parameters()).device
    mean = add_up([place.seconds], device)[0] / loop.scheduler.world
    return mean >= loop.stage.max_seconds


def _check(loop: StageLoop, stepper: Stepper, place: Place, lines: list[dict[str, Any]]) -> float | None:
    """What a checkpoint is judged by, lower is better: loss on dev if the stage has patience, else on train."""
    if loop.stage.patience is None:
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        return sum(losses) / len(losses) if losses else None
    score = held_out_loss(loop, stepper)
    lines[-1]["dev_loss"] = score
    if place.best is None or score < place.best:
        place.best, place.waited = score, 0
    else:
        place.waited += 1
        place.over = place.over or place.waited >= loop.stage.patience
    return score


def held_out_loss(loop: StageLoop, stepper: Stepper) -> float:
    """Mean loss a label on the held-out samples, each once, shared among the ranks."""
    data = loop.held_out
    assert data is not None
    loop.model.eval()
    summed = labels = 0.0
    with torch.no_grad():
        for step in range(len(data.plan)):
            for batch in load_step(data, step, stepper.rank, stepper.world, even=True):
                loss, count = batch_loss(stepper, batch)
                summed, labels = summed + float(loss), labels + float(count)
    loop.model.train()
    summed, labels = add_up([summed, labels], stepper.device)
    return summed / max(1.0, labels)
