"""Which form of a batch is fastest here, forward and backward: `python tests/benchmarks/batch_forms.py`.

SmolLM2-135M with connector and LoRA learning, the same samples of nearly equal length in each form, so that no form has
padding to speak of. What differs is the attention:

rows      a padded row a sample, transformers' sdpa (the blocked kernel on CPU): the base
blocked   one packed row, one call of sdpa a sample, with the blocked kernel
plain     one packed row, one call of sdpa a sample, as plain products
square    one packed row with a dense block-diagonal mask, which computes the whole square: the fallback

Training takes `plain` up to `models.attention.SHORT` tokens and `blocked` beyond (on CUDA, one variable-length kernel
for all). The verdict is about that choice against rows that have no padding at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from measuring import Comparison, interleaved, machine, middle, verdict
from small_system import WORDS, System, batches_of, build, cached, noise, row_of

from components.batching.loader import StageData, batch_of
from components.batching.plan import Layout
from components.training.loop import Alone, StageLoop, make_stepper
from components.training.step import Stepper, run_step
from models import attention
from models.recipe import Optimiser, Stage

BAR = 0.90  # of rows without padding; those of a plan have 2 to 3 % of it, 3 to 17 % under a curriculum
FORMS: dict[str, tuple[Layout, int | None]] = {  # layout, and up to which length plain products are taken
    "rows": ("bucketed", None),
    "blocked": ("packed", 0),
    "plain": ("packed", 10**6),
    "square": ("packed", None),
}


def rows_of(tokens: int, count: int) -> list[dict[str, Any]]:
    """`count` clips that come to about `tokens` tokens each, audio and text."""
    rng = np.random.default_rng(tokens)
    seconds = [tokens * share / 12 for share in rng.uniform(0.95, 1.05, count)]  # 8 positions and 4 tokens a second
    return [row_of(i, s, " ".join(rng.choice(WORDS, max(1, round(2.8 * s))).tolist())) for i, s in enumerate(seconds)]


def one_step(data: StageData, stepper: Stepper, form: str) -> float:
    """Real tokens a second of a step in one of the forms."""
    layout, short = FORMS[form]
    batch = batch_of(data, data.plan.batch(0), layout)
    model: Any = stepper.module
    config, before = model.llm.config, attention.SHORT
    attention.SHORT = before if short is None else short
    config._attn_implementation = "sdpa" if form == "square" else attention.NAME
    try:
        began = time.perf_counter()
        run_step(stepper, [batch], None, seed=0)
        return batch.tokens / (time.perf_counter() - began)
    finally:
        attention.SHORT = before
        config._attn_implementation = attention.NAME


def prepared(system: System, tokens: int, budget: int) -> tuple[StageData, Stepper]:
    """Samples of about `tokens` tokens that make `budget` together, and what computes their step."""
    count = max(1, budget // tokens)
    rows = rows_of(tokens, count)
    audios = cached(system.model, noise(rows))
    stage = Stage(name="lora", train=("connector", "lora"), optimiser=Optimiser(lr=1e-9), batch_tokens=10**6)
    data = batches_of(count, stage, rows, system, audios.__getitem__)
    system.model.freeze(stage.train)
    return data, make_stepper(StageLoop(stage, data, system.model, system.tokenizer, "", 0, Alone()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 220, 350, 500], help="tokens of a sample")
    parser.add_argument("--budget", type=int, default=1000, help="tokens of a batch")
    parser.add_argument("--rounds", type=int, default=1, help="each runs every form twice")
    given = parser.parse_args()
    system = build()
    print(machine(dtype=system.dtype))
    print(f"\n{'tokens':<8}" + "".join(f"{f'{name}, tokens/s':<26}" for name in FORMS) + "chosen")
    chosen: dict[int, Comparison] = {}
    for tokens in given.lengths:
        data, stepper = prepared(system, tokens, given.budget)
        ways: dict[str, Callable[[], float]] = {form: partial(one_step, data, stepper, form) for form in FORMS}
        for way in ways.values():
            way()
        rates = interleaved(ways, given.rounds)
        length = int(data.samples.tokens.max())
        form = "plain" if length <= attention.SHORT else "blocked"
        chosen[length] = Comparison(rates["rows"], rates[form])
        cells = "".join(f"{middle(rates[name], '.0f'):<26}" for name in FORMS)
        print(f"{length:<8}{cells}{form}, {chosen[length].ratio:.2f}x rows", flush=True)
    worst = min(chosen.values(), key=lambda comparison: comparison.ratio)
    return verdict("batch_forms (the chosen form against rows, worst length)", worst.ratio, BAR, worst.drift)


if __name__ == "__main__":
    sys.exit(main())
