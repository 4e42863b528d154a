"""Training from cached features against encoding in each step: `python tests/benchmarks/cached_features.py`.

The same stage, batches, seed and step function; one side reads bfloat16 frames that were encoded before, the other runs
Moonshine tiny (real weights, 7.7 M parameters) on the padded waveforms of the batch in each step. Three stages:

ctc     the connector alone by CTC, no pass through the backbone (`small`'s first stage)
lm 13M  connector and LoRA on a random LLaMA of 13 M parameters inside, SmolLM2's vocabulary
lm 135M connector and LoRA on SmolLM2-135M (`small`'s second stage)

The bar is about the recipe of `small` as a whole, each stage with its epochs.

What caching saves is the encoder's share of a step, and nothing else: `encoder` is that share on the live side,
and `twice at` says how many times dearer an encoder would have to be for a stage to run at double speed;
`apart` is the largest relative difference between the losses of the two sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from measuring import Comparison, interleaved, machine, middle, verdict
from small_system import System, batches_of, build, cached, mixed_rows, noise
from torch import Tensor

from components.batching.loader import StageData, load_step
from components.training.loop import Alone, StageLoop, make_stepper
from components.training.optimisers import set_rates
from components.training.step import run_step, step_seed
from models.architectures import load
from models.contract import SpeechLLM
from models.preset import Preset
from models.recipe import Optimiser, Stage
from models.rendering import Audio

BAR = 2.0
CLIPS = 8  # in a batch
SMALLER = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 320,
    "intermediate_size": 960,
    "num_hidden_layers": 10,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class Reader:
    """Audio by key: from a cache, or encoded when a batch is asked for."""

    def __init__(self, model: SpeechLLM, waveforms: dict[str, Tensor]) -> None:
        self.model, self.waveforms = model, waveforms
        self.cache = cached(model, waveforms)
        self.made: dict[str, Audio] = {}
        self.live = False
        self.seconds = 0.0

    def ready(self, keys: list[str]) -> None:
        """Encode the clips of a batch in one padded call, if this is the live side."""
        if self.live:
            began = time.perf_counter()
            self.made = dict(zip(keys, self.model.listen([self.waveforms[k] for k in keys]), strict=True))
            self.seconds += time.perf_counter() - began

    def __call__(self, key: str) -> Audio:
        return self.made[key] if self.live else self.cache[key]


@dataclass
class Case:
    """A stage that is run from cached features and live."""

    system: System
    data: StageData
    reader: Reader
    initial: dict[str, Tensor]
    losses: dict[bool, list[float]] = field(default_factory=dict)
    encoding: list[float] = field(default_factory=list)  # share of a live run

    def run(self, live: bool) -> float:
        """Steps a second, the first step left out."""
        stage, reader = self.data.stage, self.reader
        self.system.restore(self.initial)
        self.system.model.freeze(stage.train)
        loop = StageLoop(stage, self.data, self.system.model, self.system.tokenizer, "", 0, Alone())
        stepper = make_stepper(loop)
        self.system.model.train()
        reader.live, losses = live, []
        for step in range(len(self.data.plan)):
            if step == 1:
                began, reader.seconds = time.perf_counter(), 0.0
            reader.ready(self.data.keys(step))
            set_rates(stepper.optimiser, stage, step, len(self.data.plan))
            batches = load_step(self.data, step)
            losses.append(run_step(stepper, batches, self.data.labels(step), step_seed(0, step)).loss)
        spent = time.perf_counter() - began
        self.system.model.eval()
        reader.live = False
        self.losses[live] = losses
        if live:
            self.encoding.append(reader.seconds / spent)
        return (len(losses) - 1) / spent

    def loss_apart(self) -> float:
        pairs = zip(self.losses[False], self.losses[True], strict=True)
        return max(abs(one - other) / abs(one) for one, other in pairs)


def case(system: System, loss: Any, rows: list[dict[str, Any]], waveforms: dict[str, Tensor]) -> Case:
    train = ("connector",) if loss == "ctc" else ("connector", "lora")
    stage = Stage(name=loss, train=train, loss=loss, optimiser=Optimiser(lr=1e-5), batch_tokens=10**6)
    reader = Reader(system.model, waveforms)
    return Case(system, batches_of(CLIPS, stage, rows, system, reader), reader, system.state(train))


def smaller(preset: Preset) -> None:
    preset.backbone = preset.backbone.model_copy(update={"weights": None, "config": SMALLER})


def alignable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clips slow enough for CTC: a label a letter at most, and eight positions a second."""
    return [row for row in rows if len(row["text"]) < 8 * row["seconds"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2, help="each runs both sides twice")
    given = parser.parse_args()
    everything, source = mixed_rows(20 * given.steps * CLIPS if given.steps < 10 else 4800)
    rows = alignable(everything)[: given.steps * CLIPS]
    waveforms = noise(rows)
    system = build()
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    print(machine(dtype=system.dtype))
    print(f"lengths of {source}; batches of {CLIPS} clips, {seconds:.1f} s of audio each")
    makers: dict[str, Callable[[], Case]] = {
        "ctc": partial(case, system, "ctc", rows, waveforms),
        "lm 13M": lambda: case(build(smaller), "lm", rows, waveforms),
        "lm 135M": partial(case, system, "lm", rows, waveforms),
    }
    columns = (
        f"{'live, steps/s':<24}{'cached, steps/s':<24}{'ratio':>7}{'encoder':>9}{'twice at':>10}{'loss apart':>12}"
    )
    print(f"\n{'':<9}{columns}")
    judged: dict[str, Comparison] = {}
    for name, make in makers.items():
        made = make()
        ways = {"live": partial(made.run, True), "cached": partial(made.run, False)}
        rates = interleaved(ways, given.rounds if name == "ctc" else 1)
        judged[name] = Comparison(rates["live"], rates["cached"])
        share = statistics.median(made.encoding)
        print(
            f"{name:<9}{middle(rates['live'], '.2f'):<24}{middle(rates['cached'], '.2f'):<24}"
            f"{judged[name].ratio:>6.2f}x{share:>9.0%}{(1 - share) / share:>9.1f}x{made.loss_apart():>10.1e}",
            flush=True,
        )
    recipe = load("funasr_llm").preset("small").recipe
    named = {"ctc": judged["ctc"], "lm": judged["lm 135M"]}
    stages = [(stage.epochs, named[stage.loss]) for stage in recipe.stages]
    live, cached_too = (
        sum(epochs / statistics.median(getattr(judged_stage, side)) for epochs, judged_stage in stages)
        for side in ("base", "other")
    )
    drift = max(judged_stage.drift for _, judged_stage in stages)
    return verdict("cached_features (the recipe of small)", live / cached_too, BAR, drift)


if __name__ == "__main__":
    sys.exit(main())
