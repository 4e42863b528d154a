"""Training: resume gives the weights of an unbroken run, whatever is killed where; more workers give the same loss."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from components.batching.loader import stage_data
from components.training.checkpoint import latest_checkpoint
from components.training.loop import Alone, StageLoop, train_stage
from components.training.schedule import learning_rate
from components.training.weights import load_tensors
from models.architectures import load
from models.contract import SpeechLLM
from models.pretrained import load_tokenizer
from models.recipe import Optimiser, Stage
from models.rendering import Audio

ROWS = [
    {
        "key": f"c{i}",
        "text": t,
        "seconds": 0.5 + 0.1 * i,
        "labels": {},
        "translation": {},
        "caption": None,
        "conversations": None,
    }
    for i, t in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight"])
]


def built(name: str = "funasr_llm") -> tuple[SpeechLLM, Any, dict[str, Audio]]:
    architecture = load(name)
    preset = architecture.preset("tiny")
    assert preset.lora is not None
    preset.lora.dropout = 0.1  # dropout must not need saved random state to resume
    tokenizer = load_tokenizer(preset.backbone.tokenizer)
    model = architecture.build(preset, tokenizer, encoders=False, seed=1)
    generator = torch.Generator().manual_seed(5)
    audios = {row["key"]: Audio({"speech": torch.randn(20 + i, 32, generator=generator)}) for i, row in enumerate(ROWS)}
    return model, tokenizer, audios


def stage(loss: str = "lm") -> Stage:
    return Stage(
        name="s",
        train=("connector",) if loss == "ctc" else ("connector", "lora"),
        loss=loss,
        optimiser=Optimiser(lr=1e-2, warmup=2),  # type: ignore[arg-type]
        epochs=3,
        batch_tokens=150,
        checkpoint_every=2,
    )


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs."""


class KillAt(Alone):
    def __init__(self, step: int) -> None:
        self.step = step

    def report(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            raise Killed


def run(url: Path, loss: str = "lm", scheduler: Any = None) -> dict[str, Tensor]:
    model, tokenizer, audios = built()
    data = stage_data(stage(loss), ROWS, model, tokenizer, audios.__getitem__, seed=0)
    train_stage(StageLoop(stage(loss), data, model, tokenizer, str(url), 0, scheduler or Alone()), [])
    return load_tensors(str(url / "weights.safetensors"))


@pytest.mark.parametrize("loss", ["lm", "ctc"])
@pytest.mark.parametrize("killed_at", [0, 1, 3, 4])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, loss: str, killed_at: int) -> None:
    straight = run(tmp_path / "straight", loss)
    with pytest.raises(Killed):
        run(tmp_path / "killed", loss, KillAt(killed_at))
    resumed = run(tmp_path / "killed", loss)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))


def test_an_unfinished_checkpoint_is_never_read(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "killed", scheduler=KillAt(4))
    newest = latest_checkpoint(str(tmp_path / "killed" / "checkpoints"))
    assert newest is not None
    (Path(newest) / "state.json").unlink()
    assert latest_checkpoint(str(tmp_path / "killed" / "checkpoints")) != newest
    assert all(torch.equal(value, straight[name]) for name, value in run(tmp_path / "killed").items())


def test_a_loss_that_is_not_finite_names_the_clips(tmp_path: Path) -> None:
    model, tokenizer, audios = built()
    audios["c3"].features["speech"][0, 0] = float("nan")
    data = stage_data(stage(), ROWS, model, tokenizer, audios.__getitem__, seed=0)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is not finite; clips of the batch: .*c3"):
        train_stage(StageLoop(stage(), data, model, tokenizer, str(tmp_path), 0, Alone()), [])


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    scheduler = Alone()
    scheduler.rank, scheduler.world = rank, world
    model, tokenizer, audios = _without_dropout()
    data = stage_data(stage(), ROWS, model, tokenizer, audios.__getitem__, seed=0)
    train_stage(StageLoop(stage(), data, model, tokenizer, folder, 0, scheduler), [])
    dist.destroy_process_group()


def _without_dropout() -> tuple[SpeechLLM, Any, dict[str, Audio]]:
    model, tokenizer, audios = built()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, tokenizer, audios


@pytest.mark.slow
def test_two_workers_give_the_losses_of_one(tmp_path: Path) -> None:
    model, tokenizer, audios = _without_dropout()
    data = stage_data(stage(), ROWS, model, tokenizer, audios.__getitem__, seed=0)
    train_stage(StageLoop(stage(), data, model, tokenizer, str(tmp_path / "one"), 0, Alone()), [])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (2, port, str(tmp_path / "two")), nprocs=2)  # type: ignore[no-untyped-call]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_schedules() -> None:
    warm = Optimiser(lr=1.0, warmup=4, schedule="linear", final_lr=0.1)
    rates = [learning_rate(warm, step, 14) for step in range(15)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1)
    assert learning_rate(Optimiser(lr=1.0, schedule="cosine"), 50, 100) == pytest.approx(0.5)
    assert learning_rate(Optimiser(lr=1.0, warmup=0.1, schedule="constant"), 5, 100) == pytest.approx(6 / 11)
