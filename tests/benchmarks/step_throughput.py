"""Steps of training, ours against transformers' `Trainer`: `python tests/benchmarks/step_throughput.py`.

The same model object (SmolLM2-135M, Moonshine tiny, LoRA and connector learn), the same clips in the same batches, the
same number of steps, optimiser, precision and cores. What differs is what the bar is about:

ours     one packed row without padding, logits only where labels are, features from a cache
live     Trainer with rows padded to the longest of a random batch, logits and cross entropy over every position, and
         the encoder in each step: the usual practice
cached   the same Trainer given cached features: the stricter base

A rate counts real tokens (audio positions and text) only. The first step of every run is not counted. The losses of
the runs are compared, so that all of them did the same work. Features and waveforms are in memory on every side, and
the Trainer's samples are rendered before the clock starts, ours while it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from measuring import Comparison, interleaved, machine, middle, verdict
from small_system import System, batches_of, build, cached, mixed_rows, noise
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from components.batching.loader import StageData
from components.training.loop import Alone, StageLoop, train_stage
from models.batch import Batch, Pair, collate, padded
from models.contract import SpeechLLM
from models.recipe import Optimiser, Stage
from models.rendering import Audio

BAR = 2.0
CLIPS = 8  # in a batch
LEARN = ("connector", "lora")
RATE = 1e-5  # linear to zero on both sides; a larger one lets a fresh connector run off, each time elsewhere


@dataclass
class Run:
    """When the steps of a run ended, their losses, and the share of each that went by waiting for data."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def tokens_per_second(self, data: StageData) -> float:
        counted = data.samples.tokens[data.plan.order[data.plan.starts[1] : data.plan.starts[len(self.ends)]]]
        return float(counted.sum()) / (self.ends[-1] - self.ends[0])


# ---- ours -----------------------------------------------------------------------------------------------------------


class Noting(Alone):
    def __init__(self, run: Run) -> None:
        self.run = run

    def report(self, metrics: dict[str, Any]) -> None:
        self.run.ends.append(time.perf_counter())
        self.run.losses.append(metrics["loss"])
        self.run.waits.append(metrics["data_wait"])


def ours(system: System, data: StageData) -> Run:
    """The stage through `train_stage`, checkpoints and metrics included, but for those after the last step."""
    run = Run()
    with tempfile.TemporaryDirectory() as folder:
        train_stage(StageLoop(data.stage, data, system.model, system.tokenizer, folder, 0, Noting(run)), [])
    return run


# ---- Trainer --------------------------------------------------------------------------------------------------------


class PaddedSpeechLLM(nn.Module):
    """The model as it is usually wrapped: padded rows in, mean loss over all positions out."""

    def __init__(self, model: SpeechLLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any], waveforms: list[Tensor] | None = None) -> dict[str, Tensor]:
        rows = Batch(**batch)
        if waveforms is not None:
            # In float32, in which the cache was made: on CPU bfloat16 is not faster for it.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                frames = self.model.encoder("speech")(waveforms)
            rows.features = {"speech": padded([clip.bfloat16() for clip in frames])}
            rows.lengths = {"speech": torch.tensor([len(clip) for clip in frames])}
        made = self.model.llm(
            inputs_embeds=self.model.embed(rows)[0], attention_mask=(rows.segments > 0).long(), labels=rows.labels
        )
        return {"loss": made.loss}


def pad_collator(items: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Rows padded on the right to the longest of the batch."""
    live = "waveform" in items[0]
    pairs: list[Pair] = [(item["rendered"], [Audio() if live else item["audio"]]) for item in items]
    batch = collate(pairs, pad_id, "right")
    collated: dict[str, Any] = {"batch": {f.name: getattr(batch, f.name) for f in fields(batch)}}
    return collated | ({"waveforms": [item["waveform"] for item in items]} if live else {})


class Watching(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.run.ends.append(time.perf_counter())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.run.losses.append(logs["loss"])


def trainer(system: System, data: StageData, items: list[dict[str, Any]]) -> Run:
    """The same batches through `Trainer`: the items are shuffled already, so it takes them in order."""
    run = Run()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=CLIPS,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            bf16=system.dtype == torch.bfloat16,
            use_cpu=True,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = partial(pad_collator, pad_id=data.pad_id)
        model = PaddedSpeechLLM(system.model)
        found = Trainer(model, settings, collator, train_dataset=items, callbacks=[Watching(run)])  # type: ignore[arg-type]
        found.pop_callback(next(c for c in found.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"))
        found.train()
    return run


# ---- comparison -----------------------------------------------------------------------------------------------------


def padding(tokens: np.ndarray[Any, Any]) -> float:
    """Share of padding when neighbours are batched; `(samples,)` lengths."""
    rows = tokens[: len(tokens) // CLIPS * CLIPS].reshape(-1, CLIPS)
    return 1 - float(rows.sum()) / float(rows.max(axis=1).sum() * CLIPS)


def prepared(system: System, steps: int) -> tuple[StageData, dict[str, list[dict[str, Any]]], str]:
    """The stage, the Trainer's items for both of its variants, and where the lengths come from."""
    rows, source = mixed_rows(steps * CLIPS)
    waveforms = noise(rows)
    audios = cached(system.model, waveforms)
    settings = Optimiser(lr=RATE, schedule="linear")
    stage = Stage(name="lora", train=LEARN, optimiser=settings, checkpoint_every=10**6, batch_tokens=10**6)
    data = batches_of(CLIPS, stage, rows, system, audios.__getitem__)
    items: dict[str, list[dict[str, Any]]] = {"live": [], "cached": []}
    for number, row in enumerate(rows):
        audio = audios[row["key"]]
        rendered = data.render(data.sample(number), [audio])
        items["live"].append({"rendered": rendered, "waveform": waveforms[row["key"]]})
        items["cached"].append({"rendered": rendered, "audio": audio})
    return data, items, source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=1, help="each runs everything twice")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    system = build()
    data, items, source = prepared(system, given.steps)
    print(machine(dtype=system.dtype))
    print(f"lengths of {source}; {given.steps} steps of {CLIPS} clips, {data.samples.tokens.mean():.0f} tokens each")
    print(f"padding of the Trainer's batches {padding(data.samples.tokens):.0%}, ours 0 %")
    initial = system.state(LEARN)
    runs: dict[str, list[Run]] = {name: [] for name in ("live", "cached", "ours")}

    def way(name: str, start: Callable[[], Run]) -> Callable[[], float]:
        def measure() -> float:
            system.restore(initial)
            system.model.freeze(LEARN)
            runs[name].append(start())
            return runs[name][-1].tokens_per_second(data)

        return measure

    ways = {
        "live": way("live", partial(trainer, system, data, items["live"])),
        "cached": way("cached", partial(trainer, system, data, items["cached"])),
        "ours": way("ours", partial(ours, system, data)),
    }
    rates = interleaved(ways, given.rounds)
    against = {name: Comparison(rates[name], rates["ours"]) for name in ("live", "cached")}
    print(f"\n{'':<34}{'real tokens/s (least to most)':<32}{'ours':>8}{'loss apart':>12}")
    titles = {"live": "Trainer, live encoder", "cached": "Trainer, cached features", "ours": "ours"}
    for name, title in titles.items():
        ratio = f"{against[name].ratio:.2f}x" if name in against else ""
        apart = f"{loss_apart(runs['ours'][0], runs[name][0]):.1e}"
        print(f"{title:<34}{middle(rates[name]):<32}{ratio:>8}{apart:>12}")
    waited = statistics.fmean(share for run in runs["ours"] for share in run.waits[1:])
    print(f"ours waits for data {waited:.2%} of the time")
    return verdict("step_throughput", against["live"].ratio, BAR, against["live"].drift)


def loss_apart(one: Run, other: Run) -> float:
    """Largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(one.losses, other.losses, strict=True))


if __name__ == "__main__":
    sys.exit(main())
