"""One step and what it is made of: the mean over labels, groups with their own settings, seeds, stored precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import Built, built, make_loop, make_stage

from components.batching.loader import load_step
from components.training.loop import StageLoop, make_stepper
from components.training.optimisers import build_optimiser, set_rates
from components.training.precision import autocast, store_frozen
from components.training.schedule import learning_rate
from components.training.step import run_step, step_seed
from components.training.watch import flops_per_token
from models.batch import Batch
from models.recipe import Optimiser, Stage


def ready(stage: Stage | None = None, parts: Built | None = None, **given: Any) -> StageLoop:
    """A stage whose model is frozen as its plan says, as `train_stage` begins it."""
    loop = make_loop("unused", stage or make_stage(), parts, **given)
    loop.model.freeze(loop.stage.train)
    return loop


def learning(loop: StageLoop) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in loop.model.named_parameters() if p.requires_grad}


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_means_over_the_labels_of_the_global_batch() -> None:
    loop = ready()
    summed, labels = loop.model(load_step(loop.data, 1)[0])
    mean = summed / labels
    mean.backward()
    by_hand = torch.cat([p.grad.flatten() for p in loop.model.parameters() if p.grad is not None])
    stepper = make_stepper(loop)
    batches = load_step(loop.data, 1, micro_tokens=130)
    assert len(batches) > 2
    outcome = run_step(stepper, batches, loop.data.labels(1), seed=0)
    assert outcome.labels == int(labels) == sum(batch.label_tokens for batch in batches)
    assert outcome.loss == pytest.approx(mean.item(), rel=1e-5)
    assert outcome.norm == pytest.approx(float(by_hand.norm()), rel=1e-4)
    assert outcome.tokens == sum(batch.tokens for batch in batches) <= outcome.positions


def test_the_norm_is_of_the_gradient_before_it_was_clipped_and_the_step_is_clipped() -> None:
    norms, moved = [], []
    for clip in (0.0, 1e-3):
        loop = ready(make_stage(optimiser=Optimiser(lr=1e-3, clip=clip)))
        stepper = make_stepper(loop)
        norms.append(run_step(stepper, load_step(loop.data, 0), loop.data.labels(0), 0).norm)
        first = stepper.optimiser.param_groups[0]["params"][0]
        moved.append(float(stepper.optimiser.state[first]["exp_avg"].norm()))
    assert norms[0] == norms[1] > 1e-2
    assert moved[1] / moved[0] == pytest.approx(1e-3 / norms[0], rel=1e-3)


def test_a_plan_of_other_labels_is_refused() -> None:
    loop = ready()
    before = learning(loop)
    with pytest.raises(RuntimeError, match=r"has \d+ labels where the plan has 1: .*remove the stage's folder"):
        run_step(make_stepper(loop), load_step(loop.data, 0), 1, 0)
    assert all(torch.equal(before[n], value) for n, value in learning(loop).items())


def test_dropout_follows_from_the_seed_of_the_step_alone() -> None:
    losses = []
    for disturbed in (False, True):
        loop = ready(parts=built(dropout=0.5))
        loop.model.train()
        torch.manual_seed(disturbed)
        batches = load_step(loop.data, 1, micro_tokens=150)
        losses += [run_step(make_stepper(loop), batches, loop.data.labels(1), seed).norm for seed in (7, 8)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_a_worker_without_samples_adds_nothing_in_either_loss() -> None:
    for loss in ("lm", "ctc"):
        loop = ready(make_stage(loss))
        few = next(step for step in range(len(loop.data.plan)) if len(loop.data.plan.batch(step)) < 4)
        (idle,) = load_step(loop.data, few, rank=3, world=4)
        stepper = make_stepper(loop)
        before = learning(loop)
        outcome = run_step(stepper, [idle], 0, 0)
        assert (outcome.labels, outcome.loss, outcome.norm) == (0, 0.0, 0.0), loss
        assert all(torch.equal(before[n], value) for n, value in learning(loop).items())


def test_step_seeds_have_no_collisions() -> None:
    pairs = [(seed, step) for seed in range(100) for step in range(1000)]
    pairs += [(seed, step) for seed in (0, 1, 2**31) for step in range(1000, 20_000)]
    seeds = {step_seed(seed, step) for seed, step in pairs}
    assert len(seeds) == len(pairs) == 157_000
    assert max(seeds) * 8192 + 8191 < 2**64


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_each_group_has_its_own_settings_and_schedule() -> None:
    own = Optimiser(lr=1e-4, schedule="linear", weight_decay=0.1, betas=(0.8, 0.9))
    stage = make_stage(optimiser=Optimiser(lr=4e-3, warmup=3, schedule="constant"), groups={"lora": own})
    loop = ready(stage)
    optimiser = build_optimiser(loop.model, stage)
    by_group = {group["group"]: group for group in optimiser.param_groups}
    assert set(by_group) == {"connector", "lora"}
    assert (by_group["lora"]["weight_decay"], by_group["lora"]["betas"]) == (0.1, (0.8, 0.9))
    assert (by_group["connector"]["weight_decay"], by_group["connector"]["betas"]) == (0.0, (0.9, 0.999))
    assert sum(len(group["params"]) for group in by_group.values()) == len(learning(loop))
    seen = []
    for step in (0, 2, 5, 10):
        returned = set_rates(optimiser, stage, step, 10)
        assert returned == by_group["connector"]["lr"]
        seen += [by_group["connector"]["lr"], by_group["lora"]["lr"]]
    assert seen == pytest.approx([1e-3, 1e-4, 3e-3, 8e-5, 4e-3, 5e-5, 4e-3, 0.0])


def test_the_first_step_of_adamw_is_as_long_as_the_rate_of_the_group() -> None:
    stage = make_stage(optimiser=Optimiser(lr=1e-2, clip=0), groups={"lora": Optimiser(lr=1e-4)})
    loop = ready(stage)
    stepper, before = make_stepper(loop), learning(loop)
    set_rates(stepper.optimiser, stage, 0, 10)
    run_step(stepper, load_step(loop.data, 0), loop.data.labels(0), 0)
    moved = {n: float((value - before[n]).abs().max()) for n, value in learning(loop).items()}
    assert max(m for n, m in moved.items() if n.startswith("connector.")) == pytest.approx(1e-2, rel=1e-3)
    assert max(m for n, m in moved.items() if ".lora_B" in n) == pytest.approx(1e-4, rel=1e-3)


def test_settings_of_a_group_that_is_not_trained_are_refused() -> None:
    stage = make_stage(train=("connector",), groups={"lora": Optimiser(), "llm": Optimiser()})
    with pytest.raises(ValueError, match="stage 'tune' has settings for groups it does not train: llm, lora"):
        make_stepper(ready(stage))


def test_schedules() -> None:
    warm = Optimiser(lr=1.0, warmup=4, schedule="linear", final_lr=0.1)
    rates = [learning_rate(warm, step, 14) for step in range(15)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert learning_rate(Optimiser(lr=1.0, schedule="cosine"), 50, 100) == pytest.approx(0.5)
    assert learning_rate(Optimiser(lr=1.0, warmup=0.1, schedule="constant"), 5, 100) == pytest.approx(6 / 11)


# ---- precision and size ---------------------------------------------------------------------------------------------


def loss_under_autocast(loop: StageLoop, batch: Batch) -> tuple[float, list[Tensor]]:
    loop.model.zero_grad()
    with autocast(torch.device("cpu"), torch.bfloat16):
        summed, _ = loop.model(batch)
    summed.backward()
    return summed.item(), [p.grad.clone() for p in loop.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_frozen_matrices_in_half_the_bytes_give_the_same_bits(layout: Any) -> None:
    loop = ready(make_stage(train=("connector", "lora")), layout=layout)
    batch = load_step(loop.data, 1)[0]
    loss, gradients = loss_under_autocast(loop, batch)
    frozen = [m.weight for _, m in sorted(loop.model.llm.named_modules()) if isinstance(m, torch.nn.Linear)]
    frozen = [w for w in frozen if not w.requires_grad and w is not loop.model.llm.get_input_embeddings().weight]
    bytes_before = sum(w.nbytes for w in frozen)
    store_frozen(loop.model, torch.bfloat16, trained_later=set())
    assert bytes_before == 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert sum(w.nbytes for w in frozen) == bytes_before // 2
    assert all(p.dtype == torch.float32 for p in loop.model.parameters() if p.requires_grad)
    assert loop.model.llm.get_input_embeddings().weight.dtype == torch.float32
    again, gradients_again = loss_under_autocast(loop, batch)
    assert again == loss
    assert all(torch.equal(left, right) for left, right in zip(gradients, gradients_again, strict=True))


def test_matrices_that_learn_in_a_later_stage_stay_whole() -> None:
    loop = ready(make_stage(train=("connector",)))
    store_frozen(loop.model, torch.bfloat16, trained_later=set(loop.model.parameter_groups()["llm"]))
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}
    store_frozen(loop.model, torch.float32, trained_later=set())
    assert {p.dtype for p in loop.model.parameters()} == {torch.float32}


def test_operations_of_a_token_by_hand() -> None:
    model = built().model
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k and v, o, MLP, norms
    lora = 2 * (2 * 4 * 32 + 4 * 32 + 4 * 16)  # of q and v in two layers
    backbone = 2 * layer + 32
    model.freeze(("connector",))
    assert flops_per_token(model) == 4 * (backbone + lora)
    model.freeze(("connector", "lora"))
    assert flops_per_token(model) == 4 * backbone + 6 * lora
    model.freeze(("llm",))
    assert flops_per_token(model) == 6 * backbone + 4 * lora


def test_stage_trains_what_it_names(tmp_path: Path) -> None:
    from components.training.loop import train_stage

    loop = make_loop(tmp_path, make_stage(train=("connector",), max_steps=1))
    groups = loop.model.parameter_groups()
    names = train_stage(loop, [groups["lora"][0]])
    assert names == sorted([*groups["connector"], groups["lora"][0]])
