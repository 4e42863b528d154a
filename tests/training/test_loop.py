"""A stage from its first step to its weights: the same bits after a stop anywhere, and what is written on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_helpers import (
    DEV,
    ROWS,
    Eyes,
    apart,
    built,
    curve,
    final,
    make_loop,
    make_stage,
    sha256,
    stopped,
    trained,
    two_stages,
    untimed,
)

from components.batching.loader import load_step
from components.training import loop as loop_module
from components.training import watch
from components.training.checkpoint import Checkpoints
from components.training.history import join_segments, read_metrics, write_segment
from components.training.loop import held_out_loss, make_stepper, train_stage
from components.training.shards import Damaged
from models.recipe import Optimiser

EVEN = Optimiser(lr=5e-3, schedule="constant")
STEPS = 9


# ---- stopped and resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
@pytest.mark.parametrize("loss", ["lm", pytest.param("ctc", marks=pytest.mark.slow)])
def test_stopped_and_resumed_gives_the_same_bits(tmp_path: Path, loss: str, layout: Any) -> None:
    stage = make_stage(loss)
    trained(tmp_path / "straight", stage, built(dropout=0.1), layout=layout)
    for stop in (0, 1, 4, None):  # before the first checkpoint, at one, in between; then to the end
        if stop is None:
            trained(tmp_path / "stopped", stage, built(dropout=0.1), layout=layout)
            break
        stopped(stop, tmp_path / "stopped", stage, built(dropout=0.1), layout=layout)
    weights = [tmp_path / name / "weights.safetensors" for name in ("straight", "stopped")]
    assert sha256(weights[0]) == sha256(weights[1])
    assert untimed(tmp_path / "straight") == untimed(tmp_path / "stopped")
    assert len(curve(tmp_path / "straight")) == STEPS


def test_a_stage_that_ended_but_was_not_published_only_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trained(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    monkeypatch.setattr(loop_module, "run_step", None)
    assert apart(trained(tmp_path), straight) == 0.0
    assert len(curve(tmp_path)) == STEPS


def test_an_unfinished_checkpoint_is_never_read(tmp_path: Path) -> None:
    straight = trained(tmp_path / "straight")
    stopped(6, tmp_path / "stopped")
    checkpoints = Checkpoints(str(tmp_path / "stopped" / "checkpoints"))
    newest = checkpoints.latest()
    assert newest is not None
    (Path(newest) / "state.json").unlink()
    assert checkpoints.latest() != newest
    assert apart(trained(tmp_path / "stopped"), straight) == 0.0


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight = trained(tmp_path / "straight")
    stopped(6, tmp_path / "stopped")
    newest = Checkpoints(str(tmp_path / "stopped" / "checkpoints")).latest()
    assert newest is not None
    assert newest.endswith("step-0000006")
    (file,) = Path(newest).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert apart(trained(tmp_path / "stopped"), straight) == 0.0
    assert f"{file} is damaged" in caplog.text
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "straight")


def test_when_no_checkpoint_is_whole_the_stage_does_not_begin_again(tmp_path: Path) -> None:
    stopped(6, tmp_path)
    for file in tmp_path.glob("checkpoints/step-*/*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(Damaged, match=r"remove .*step-"):
        trained(tmp_path)


def test_the_second_stage_starts_from_the_first_and_publishes_both(tmp_path: Path) -> None:
    parts = built()
    two_stages(tmp_path, parts)
    groups = parts.model.parameter_groups()
    aligned, tuned = final(tmp_path / "align"), final(tmp_path / "tune")
    assert list(aligned) == sorted(groups["connector"])
    assert list(tuned) == sorted([*groups["connector"], *groups["lora"]])
    fresh = trained(tmp_path / "fresh")
    assert apart(tuned, fresh) > 1e-2  # it matters where a stage starts
    again = built()
    two_stages(tmp_path, again)  # both are published: nothing is trained
    parameters = dict(again.model.named_parameters())
    assert apart({n: parameters[n].detach() for n in tuned}, tuned) == 0.0


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_lines_of_metrics_say_what_a_person_asks(tmp_path: Path) -> None:
    stage = make_stage(groups={"lora": Optimiser(lr=1e-4)})
    loop = make_loop(tmp_path, stage)
    train_stage(loop, [])
    lines = read_metrics(str(tmp_path))
    for line in lines:
        batch = loop.data.plan.batch(line["step"])
        assert line["tokens"] == loop.data.samples.tokens[batch].sum()
        assert line["labels"] == loop.data.samples.labels[batch].sum()
        rectangle = loop.data.samples.tokens[batch].max() * len(batch)
        assert line["padding"] == pytest.approx(1 - line["tokens"] / rectangle)
        assert line["samples_per_second"] / line["tokens_per_second"] == pytest.approx(len(batch) / line["tokens"])
        assert 0 < line["mfu"] < 1
        assert 0 <= line["data_wait"] <= 1
        assert line["gradient_norm"] > 0
        assert line["tasks"] == {"asr": 1.0}
        assert line["stage"] == "tune"
    assert lines[0]["lr"] == pytest.approx(5e-3 / 3)
    assert [line["epoch"] for line in lines] == loop.data.plan.epochs.tolist()
    assert read_metrics(str(tmp_path / "nothing")) == []


def test_ctc_lines_have_no_mfu_as_the_backbone_does_not_run(tmp_path: Path) -> None:
    trained(tmp_path, make_stage("ctc", max_steps=1), layout="packed")
    (line,) = read_metrics(str(tmp_path))
    assert "mfu" not in line
    assert line["padding"] == 0.0


def test_pieces_of_metrics_join_to_one_line_a_step_whatever_attempts_left(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_segment(url, 2, [{"step": 0, "a": 1}, {"step": 1, "a": 1}])
    write_segment(url, 3, [{"step": 2, "a": 1}])  # time was up here, but the checkpoint was lost
    write_segment(url, 4, [{"step": 2, "a": 2}, {"step": 3, "a": 2}])
    write_segment(url, 6, [{"step": 4, "a": 1}])  # of an attempt that went further
    join_segments(url, 4)
    assert curve(tmp_path, "a") == [1, 1, 2, 2]


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_time_that_is_up_ends_the_stage_over_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # one second a look: two for a step, from asking for data to its end
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stage = make_stage(max_seconds=9, optimiser=EVEN)
    stopped(2, tmp_path, stage)
    weights = trained(tmp_path, stage)
    assert len(curve(tmp_path)) == 5
    assert apart(weights, trained(tmp_path / "five", make_stage(max_steps=5, optimiser=EVEN))) == 0.0
    state = json.loads((tmp_path / "checkpoints" / "step-0000005" / "state.json").read_text())["state"]
    assert (state["seconds"], state["over"]) == (10.0, True)


def test_a_plateau_ends_the_stage_with_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(loop_module, "held_out_loss", lambda *_: next(scores))
    parts = built()
    eyes = Eyes(parts.model)
    weights = trained(tmp_path, make_stage(patience=2), parts, dev=DEV, scheduler=eyes)
    assert len(curve(tmp_path)) == 8 < STEPS  # the fourth checkpoint is the second without a better loss
    assert apart(weights, eyes.seen[3]) == 0.0
    assert apart(weights, eyes.seen[7]) > 1e-4
    dev = [line["dev_loss"] for line in read_metrics(str(tmp_path)) if "dev_loss" in line]
    assert dev == [3.0, 2.0, 2.5, 2.0]


def test_patience_goes_on_where_it_was_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    monkeypatch.setattr(loop_module, "held_out_loss", lambda *_: next(scores))
    stopped(6, tmp_path, make_stage(patience=2), dev=DEV)
    trained(tmp_path, make_stage(patience=2), dev=DEV)
    assert len(curve(tmp_path)) == 8


def test_the_loss_on_dev_is_the_mean_over_its_labels(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, make_stage(batch_tokens=130), dev=DEV)
    loop.model.freeze(loop.stage.train)
    assert loop.held_out is not None
    assert len(loop.held_out.plan) > 1
    one_by_one = [
        loop.model(load_step(loop.held_out, step, rank, 3)[0])
        for step in range(len(loop.held_out.plan))
        for rank in range(len(loop.held_out.plan.batch(step)))
    ]
    mean = sum(loss.item() for loss, _ in one_by_one) / sum(int(count) for _, count in one_by_one)
    assert held_out_loss(loop, make_stepper(loop)) == pytest.approx(mean, rel=1e-5)
    assert loop.model.training


def test_patience_without_clips_to_judge_by_is_said_before_the_first_step(tmp_path: Path) -> None:
    for dev in ([], [DEV[0] | {"text": None}]):
        eyes = Eyes(torch.nn.Identity())
        with pytest.raises(ValueError, match="'tune' stops on a plateau and needs clips of the dev split"):
            trained(tmp_path, make_stage(patience=2), dev=dev, scheduler=eyes)
        assert eyes.seen == []


def test_training_teaches(tmp_path: Path) -> None:
    trained(tmp_path, make_stage("ctc", epochs=30, optimiser=Optimiser(lr=5e-3)), rows=ROWS[:4])
    losses = curve(tmp_path)
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.2 * sum(losses[:4])
