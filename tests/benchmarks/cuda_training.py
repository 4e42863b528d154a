"""Training on a card, backbones of 1 to 7 B with LoRA from cached features: `python tests/benchmarks/cuda_training.py`.

FunASR-LLM's connector (5 frames of 1280 at 50 Hz → 10 positions a second) into Llama-shaped backbones with random
weights; ragged audio with text, packed without padding; loop, optimiser and checkpoints are those of training. Each
line is a run in a process of its own: medians over its steps after the first ones. MFU is the share of the card's own
matrix-product rate (measured in the same process) that the backbone's useful operations reach; attention's own products
are not counted. Sizes that the card cannot hold are left out. The table goes to standard output, and to `--out`.

No test needs a card: `--tiny` runs the same code on any device with a backbone of 0.1 M.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from measuring import machine
from small_system import mixed_rows
from transformers import AutoConfig

from components.batching.loader import stage_data
from components.training.compute import Compute
from components.training.fit import free_bytes
from components.training.loop import Alone, StageLoop, train_stage
from components.training.precision import compute_dtype, matmul_rate, store_frozen
from models.architectures import load
from models.contract import SpeechLLM
from models.pretrained import load_tokenizer
from models.recipe import Optimiser, Stage
from models.rendering import Audio

HERTZ, FEATURES = 50, 1280
WARM = 3  # steps that are not counted; compilation is in the first
LEARN = ("connector", "lora")
SIZES: dict[str, dict[str, int]] = {  # width, MLP, layers, heads, key-value heads
    "tiny": {"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "kv": 2},
    "1B": {"hidden": 2048, "mlp": 8192, "layers": 16, "heads": 32, "kv": 8},
    "3B": {"hidden": 3072, "mlp": 8192, "layers": 28, "heads": 24, "kv": 8},
    "7B": {"hidden": 4096, "mlp": 11008, "layers": 32, "heads": 32, "kv": 32},
}
VARIANTS = {"plain": {}, "compiled": {"compile": True}, "recomputed": {"activation_checkpointing": True}}


class Lines(Alone):
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any]) -> None:
        self.lines.append(metrics)


def llama(size: str, vocabulary: int) -> dict[str, Any]:
    sizes = SIZES[size]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["mlp"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv"],
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def build(size: str, vocabulary: int, device: torch.device) -> SpeechLLM:
    """Random weights, made on the device, held as training holds them."""
    kind = load("funasr_llm")
    preset = kind.preset("paper").without_weights()
    preset.backbone.config = llama(size, vocabulary)
    torch.manual_seed(0)
    with torch.device(device):
        config = kind.make_config(preset, AutoConfig.for_model(**preset.backbone.config))
        model = kind(config, encoders=False)
    model.freeze(LEARN)
    store_frozen(model, compute_dtype(device), set())
    return model


def run(size: str, variant: str, steps: int, budget: int) -> dict[str, Any]:
    """A stage of `steps` steps; medians of what the watch measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer("bytes" if size == "tiny" else "earloom/smollm2-135m-instruct")
    model = build(size, len(tokenizer), device)
    rows, _ = mixed_rows(min(4800, max(64, steps * budget // 32)))
    noise = torch.randn(int(HERTZ * max(row["seconds"] for row in rows)) + 1, FEATURES).bfloat16()
    frames = {row["key"]: max(5, int(HERTZ * row["seconds"])) for row in rows}
    stage = Stage(
        name="bench", train=LEARN, optimiser=Optimiser(lr=1e-4), epochs=100, max_steps=steps, batch_tokens=budget
    )

    def read(key: str) -> Audio:
        return Audio({"speech": noise[: frames[key]]})

    data = stage_data(stage, rows, model, tokenizer, read, seed=0, layout="packed")
    watched = Lines()
    compute = Compute(**VARIANTS[variant])
    with tempfile.TemporaryDirectory() as folder:
        train_stage(StageLoop(stage, data, model, tokenizer, folder, 0, watched, compute), [])
    counted = watched.lines[WARM:]
    middle = {name: statistics.median(line[name] for line in counted) for name in ("tokens_per_second", "mfu")}
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
    return middle | {
        "parameters": sum(p.numel() for p in model.llm.parameters()),
        "padding": max(line["padding"] for line in counted),
        "data_wait": statistics.median(line["data_wait"] for line in counted),
        "peak_bytes": counted[-1].get("gpu_bytes", on_cpu),
        "device_rate": matmul_rate(device, compute_dtype(device)),
        "machine": machine(device, compute_dtype(device)),
    }


def fits(size: str) -> bool:
    """Whether the card holds the float32 weights while they are made, with room for activations."""
    if not torch.cuda.is_available():
        return size == "tiny"
    s = SIZES[size]
    weights = s["layers"] * s["hidden"] * (3 * s["mlp"] + 2 * s["hidden"] * (1 + s["kv"] / s["heads"]))
    return 4 * weights * 1.3 < free_bytes(torch.device("cuda"))


def table(found: dict[tuple[str, str], dict[str, Any]], budget: int) -> str:
    first = next(iter(found.values()))
    lines = [
        f"{first['machine']}; {first['device_rate'] / 1e12:.1f} Tflop/s in its own matrix products",
        "",
        f"Packed to {budget:,} tokens, LoRA rank 16 and connector in float32, cached features.",
        "",
        "| backbone | variant | tokens/s | MFU | peak memory | waits for data | padding |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {size}, {f['parameters'] / 1e9:.2f} B | {variant} | {f['tokens_per_second']:,.0f} | {f['mfu']:.1%} | "
        f"{f['peak_bytes'] / 1e9:.1f} GB | {f['data_wait']:.2%} | {f['padding']:.1%} |"
        for (size, variant), f in found.items()
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["1B", "3B", "7B"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--tiny", action="store_true", help="the smallest backbone, on whatever device there is")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "VARIANT"), help="one line, in this process, as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run(*given.one, given.steps, given.budget)))
        return 0
    sizes = ["tiny"] if given.tiny else [size for size in given.sizes if fits(size)]
    if not sizes:
        print("no CUDA device with enough memory: nothing measured (--tiny runs anywhere)")
        return 0
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for size in sizes:
        for variant in given.variants:
            command = [sys.executable, __file__, "--one", size, variant]
            command += ["--steps", str(given.steps), "--budget", str(given.budget)]
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
            if ended.returncode:
                print(f"{size} {variant} failed: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
                continue
            found[size, variant] = json.loads(ended.stdout.splitlines()[-1])
    if not found:
        return 1
    made = table(found, given.budget)
    print(made)
    if given.out:
        given.out.write_text(made + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
