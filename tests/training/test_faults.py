"""What goes wrong in the middle of a stage: batches that are not finite, memory or disk that runs out, lost storage."""

from __future__ import annotations

import errno
import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from training_helpers import Built, Eyes, apart, built, curve, final, make_loop, make_stage, stopped, trained, untimed

from components.training import memory
from components.training.checkpoint import Checkpoints
from components.training.history import read_metrics
from components.training.loop import train_stage
from infra import storage


def with_bad_clip() -> Built:
    parts = built()
    parts.audios["c3"].features["speech"][0, 0] = float("nan")
    return parts


def bad_steps(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in sorted((folder / "bad-batches").glob("*.json"))]


# ---- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
@pytest.mark.parametrize("loss", ["lm", "ctc"])
def test_a_batch_that_is_not_finite_is_named_and_left_out(
    tmp_path: Path, loss: str, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    parts = with_bad_clip()
    eyes = Eyes(parts.model)
    loop = make_loop(tmp_path, make_stage(loss), parts, layout=layout, scheduler=eyes)
    train_stage(loop, [])
    bad = [step for step in range(len(loop.data.plan)) if "c3" in loop.data.keys(step)]
    assert bad_steps(tmp_path) == bad
    assert len(bad) == 3
    for step in bad:
        note = json.loads((tmp_path / "bad-batches" / f"step-{step:07d}.json").read_text())
        assert note["keys"] == loop.data.keys(step)
        assert (note["stage"], note["step"], note["loss"]) == (loop.stage.name, step, "nan")
        assert apart(eyes.seen[step], eyes.seen[step - 1]) == 0.0  # it taught nothing
    good = [step for step in range(1, len(loop.data.plan)) if step not in bad]
    assert all(apart(eyes.seen[step], eyes.seen[step - 1]) > 0 for step in good)
    assert all(bool(weight.isfinite().all()) for weight in final(tmp_path).values())
    assert [line["step"] for line in read_metrics(str(tmp_path)) if line["loss"] is None] == bad
    assert caplog.text.count("is not finite: batch left out") == 3


@pytest.mark.parametrize("allowed", [0, 2])
def test_more_bad_batches_than_allowed_stop_the_stage(tmp_path: Path, allowed: int) -> None:
    with pytest.raises(FloatingPointError) as caught:
        trained(tmp_path, make_stage(skip_batches=allowed), with_bad_clip())
    said, at = str(caught.value), bad_steps(tmp_path)
    assert len(at) == allowed + 1
    assert f"stage 'tune', step {at[-1]}: loss nan" in said
    assert "c3" in said
    assert str(tmp_path / "bad-batches" / f"step-{at[-1]:07d}.json") in said
    assert "Lower the learning rate" in said


def test_the_count_of_bad_batches_survives_a_stop(tmp_path: Path) -> None:
    bad = [step for step, keys in enumerate(keys_by_step()) if "c3" in keys]
    stopped(bad[2] - 1, tmp_path, make_stage(skip_batches=2), with_bad_clip())
    assert bad_steps(tmp_path) == bad[:2]
    with pytest.raises(FloatingPointError, match=r"for the 3\. time where 2 are allowed"):
        trained(tmp_path, make_stage(skip_batches=2), with_bad_clip())


def keys_by_step() -> list[list[str]]:
    data = make_loop("unused", make_stage()).data
    return [data.keys(step) for step in range(len(data.plan))]


def test_a_gradient_that_is_not_finite_is_left_out_likewise(tmp_path: Path) -> None:
    parts = built()
    eyes = Eyes(parts.model)
    weight = next(parts.model.connector.parameters())
    factors = iter([1.0, 1.0, float("inf"), *[1.0] * 10])
    loop = make_loop(tmp_path, make_stage(), parts, scheduler=eyes)
    weight.register_hook(lambda gradient: gradient * next(factors))
    train_stage(loop, [])
    assert bad_steps(tmp_path) == [2]
    line = read_metrics(str(tmp_path))[2]
    assert line["gradient_norm"] is None
    assert 0 < line["loss"] < 10
    assert apart(eyes.seen[2], eyes.seen[1]) == 0.0
    assert apart(eyes.seen[3], eyes.seen[2]) > 0.0


# ---- memory ---------------------------------------------------------------------------------------------------------


def with_memory_for(tokens: int) -> Built:
    """A model that runs out of memory when more tokens are computed at a time."""
    parts = built()
    forward = parts.model.forward

    def narrow(batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(batch, *args, **kwargs)

    parts.model.forward = narrow  # type: ignore[method-assign]
    return parts


@pytest.mark.slow
def test_when_memory_runs_out_the_micro_batch_is_halved_and_the_batch_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped(4, tmp_path / "narrow", parts=with_memory_for(300))
    assert caplog.text.count("out of memory") == 1  # and not again for the batches that were already made
    noted = json.loads((tmp_path / "narrow" / "memory.json").read_text())["micro_tokens"]
    assert f"going on with {noted}, the global batch stays the same" in caplog.text
    assert 150 < noted <= 250
    caplog.clear()
    narrow = trained(tmp_path / "narrow", parts=with_memory_for(300))
    assert "out of memory" not in caplog.text  # a restart begins with what was found
    chosen = trained(tmp_path / "chosen", micro_tokens=noted)
    assert curve(tmp_path / "narrow") == pytest.approx(curve(tmp_path / "chosen"), rel=1e-6)
    assert apart(narrow, chosen) < 1e-5
    wide = trained(tmp_path / "wide")
    assert curve(tmp_path / "narrow", "gradient_norm") == pytest.approx(curve(tmp_path / "wide", "gradient_norm"), 1e-4)
    assert apart(narrow, wide) < 1e-4
    assert not (tmp_path / "wide" / "memory.json").exists()


def test_a_smaller_setting_wins_over_what_was_noted(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "memory.json"), {"micro_tokens": 200})
    assert [memory.MicroBatch(str(tmp_path), asked).tokens for asked in (None, 100, 400)] == [200, 100, 200]


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "micro_tokens", [pytest.param(0, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow), 170]
)
def test_a_sample_that_never_fits_ends_with_a_remedy(tmp_path: Path, micro_tokens: int) -> None:
    with pytest.raises(memory.OutOfMemory, match=r"step \d: .*set a smaller max_tokens .*activation_checkpointing"):
        trained(tmp_path, parts=with_memory_for(110), micro_tokens=micro_tokens)


def test_other_errors_are_not_taken_for_memory() -> None:
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**60)
    assert memory.is_out_of_memory(caught.value)


# ---- storage --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_the_stage_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trained(tmp_path / "straight")
    upload, calls = storage.upload, iter(range(1000))

    def full(local: Path, url: str) -> None:
        if next(calls) >= 2:  # the third checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", url)
        upload(local, url)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "upload", full)
        with pytest.raises(
            OSError, match=r"checkpoint of step 6 .*: free disk space and run the stage again"
        ) as caught:
            trained(tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    folder = tmp_path / "full" / "checkpoints"
    assert Checkpoints(str(folder)).latest() == str(folder / "step-0000004")
    assert apart(trained(tmp_path / "full"), straight) == 0.0
    assert untimed(tmp_path / "full") == untimed(tmp_path / "straight")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The seconds that were slept, none of them really; the memory file system is empty afterwards."""
    slept = [0.0]
    really = time.sleep

    def sleep(seconds: float) -> None:
        slept[0] += seconds
        really(0)

    monkeypatch.setattr(time, "sleep", sleep)
    random.seed(0)
    yield slept
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("seconds", [pytest.param(5, marks=pytest.mark.slow), 30])
@pytest.mark.parametrize("begins", [pytest.param("put_file", marks=pytest.mark.slow), "pipe_file"])
def test_a_storage_that_is_away_for_half_a_minute_costs_time_only(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, begins: str, seconds: int
) -> None:
    straight = trained(tmp_path / "straight")
    files = type(fsspec.filesystem("memory"))
    state: dict[str, Any] = {"calls": 0, "until": None, "refused": 0}

    def unreliable(name: str) -> Any:
        real = getattr(files, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            state["calls"] += name == begins
            if state["calls"] == 4 and state["until"] is None:
                state["until"] = clock[0] + seconds
            if state["until"] is not None and clock[0] < state["until"]:
                state["refused"] += 1
                raise OSError("the endpoint is away")
            return real(self, *args, **kwargs)

        return call

    for name in ("put_file", "pipe_file", "cat_file", "info", "ls", "rm_file", "find", "get_file"):
        monkeypatch.setattr(files, name, unreliable(name))
    url = f"memory://{tmp_path.name}-{begins}-{seconds}/stage"
    weights = trained(url)
    assert state["refused"] > 2
    assert apart(weights, straight) == 0.0
    assert untimed(url) == untimed(tmp_path / "straight")
    assert len(Checkpoints(storage.join(url, "checkpoints")).complete()) >= 2


def test_warnings_name_the_stage_for_those_who_watch_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, parts=with_bad_clip())
    assert all(record.name.startswith("components.training.") for record in caplog.records)
    assert sum("stage 'tune', step" in record.getMessage() for record in caplog.records) == 3
