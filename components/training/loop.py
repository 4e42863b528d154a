"""One stage of a recipe: the training loop, without knowing who scheduled it.

Works alone, in a notebook, in a test or as one of several Ray Train workers: what it needs from the scheduler is
the small `Scheduler` protocol. Killed at any moment, the next call goes on from the newest complete checkpoint and sees
the batches that the killed one would have seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from components.batching.loader import StageData, label_ids, load_batch
from components.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, save_tensors
from components.training.precision import autocast, compute_dtype
from components.training.schedule import learning_rate
from infra import storage
from models.batch import Batch
from models.contract import SpeechLLM
from models.recipe import Stage

METRICS = "metrics.jsonl"


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
    """What the steps of a stage share."""

    stage: Stage
    data: StageData
    model: SpeechLLM
    tokenizer: PreTrainedTokenizerBase
    url: str
    seed: int
    scheduler: Scheduler


def train_stage(loop: StageLoop, trained_before: list[str]) -> list[str]:
    """Train the stage's parameter groups to its end and publish `<url>/weights.safetensors`.

    Returns the names of all parameters trained so far, those of earlier stages (`trained_before`) included.
    Raises FloatingPointError on a loss that is not finite, with the keys of the batch.
    """
    stage, model, scheduler = loop.stage, loop.model, loop.scheduler
    learning = model.freeze(stage.train)
    trained = sorted({*trained_before, *learning})
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=stage.optimiser.lr,
        betas=stage.optimiser.betas,
        weight_decay=stage.optimiser.weight_decay,
        fused=True,
    )
    first, metrics = _resume(loop, optimiser)
    wrapped = nn.parallel.DistributedDataParallel(model) if scheduler.world > 1 else model
    step_loss = _step_loss(loop, wrapped)
    model.train()
    for step in range(first, len(loop.data.plan)):
        began = time.monotonic()
        measured = _step(loop, step, step_loss, optimiser)
        measured["tokens_per_second"] = measured["tokens"] / (time.monotonic() - began)
        metrics.append(measured)
        scheduler.report(measured | {"steps": len(loop.data.plan)})
        if (step + 1) % stage.checkpoint_every == 0 and scheduler.rank == 0:
            _write_metrics(loop.url, metrics)
            save_checkpoint(
                storage.join(loop.url, "checkpoints"), step + 1, model, trained, optimiser, {"stage": stage.name}
            )
    model.eval()
    if scheduler.rank == 0:
        parameters = dict(model.named_parameters())
        _write_metrics(loop.url, metrics)
        save_tensors(storage.join(loop.url, "weights.safetensors"), {name: parameters[name] for name in trained})
    return trained


def _step(
    loop: StageLoop, step: int, step_loss: Callable[[Batch], tuple[Tensor, Tensor]], optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """One optimiser step over a global batch: the loss is a mean over all its labels, wherever they are computed."""
    stage, scheduler = loop.stage, loop.scheduler
    rate = learning_rate(stage.optimiser, step, len(loop.data.plan))
    for group in optimiser.param_groups:
        group["lr"] = rate
    torch.manual_seed(hash((loop.seed, step, scheduler.rank)) % 2**63)  # dropout needs no saved state to resume
    device = next(loop.model.parameters()).device
    batch = load_batch(loop.data, step, scheduler.rank, scheduler.world).to(device)
    with autocast(device, compute_dtype(device)):
        loss, labels = step_loss(batch)
    totals = torch.tensor(
        [float(loss.detach()), float(labels), float(batch.tokens)],
        dtype=torch.float64,
        device=device if dist.is_initialized() and dist.get_backend() == "nccl" else None,
    )
    if scheduler.world > 1:
        dist.all_reduce(totals)
    summed, count, tokens = totals.tolist()
    if not torch.isfinite(totals).all():
        keys = ", ".join(loop.data.samples[i].key for i in loop.data.plan.batches[step])
        raise FloatingPointError(
            f"stage {stage.name!r}, step {step}: the loss is not finite; clips of the batch: {keys}"
        )
    optimiser.zero_grad(set_to_none=True)
    (loss * (scheduler.world / max(1.0, count))).backward()  # DDP averages over ranks
    learning = [p for p in loop.model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(learning, stage.optimiser.clip or float("inf"))
    optimiser.step()
    seconds = float(loop.data.seconds[loop.data.plan.batches[step]].mean())
    return {
        "stage": stage.name,
        "step": step,
        "loss": summed / max(1.0, count),
        "lr": rate,
        "gradient_norm": float(norm),
        "tokens": int(tokens),
        "labels": int(count),
        "seconds_mean": seconds,
        "epoch": loop.data.plan.epochs[step],
        "tasks": loop.data.shares(step),
    }


def _step_loss(loop: StageLoop, model: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """The stage's loss as a function of a batch; the CTC vocabulary is the tokens that the stage's labels use."""
    if loop.stage.loss == "lm":
        return model
    blank = loop.tokenizer.eos_token_id
    vocabulary = torch.unique(torch.cat([label_ids(loop.data), torch.tensor([blank])]))
    return partial(model, vocabulary=vocabulary, blank=blank)


def _resume(loop: StageLoop, optimiser: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    checkpoint = latest_checkpoint(storage.join(loop.url, "checkpoints"))
    if checkpoint is None:
        return 0, []
    state = load_checkpoint(checkpoint, loop.model, optimiser)
    lines = storage.read_text(storage.join(loop.url, METRICS)).splitlines()
    return state["step"], [json.loads(line) for line in lines][: state["step"]]


def _write_metrics(url: str, metrics: list[dict[str, Any]]) -> None:
    storage.write_text(
        storage.join(url, METRICS), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in metrics)
    )
