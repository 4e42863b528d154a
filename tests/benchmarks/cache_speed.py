"""Feature extraction against its encoder alone, and against transformers: `python -m tests.benchmarks.cache_speed`.

Real speech where there is some, else noise, cut to clips whose lengths are drawn log-normally, as FLAC in audio shards
in memory; Moonshine tiny with its real weights. What is compared takes turns, in processes that are warm by then.

bare    the same encoder on the same batches, all waveforms already in memory, results dropped; one core
ours    a shard as the cache stage does it: sha256, FLAC, digest of each clip, encoder, safetensors, tar; the same core
one     transformers as its documentation shows: a clip is decoded, encoded and saved as bfloat16, one after the other,
        in one process with all cores; against it, `ours` as the cache stage runs it: one process for each core.
        What it does on one core, without padding and without waiting of threads, is printed as well

`--compute bfloat16` has `bare` and `ours` compute so; transformers stays as its documentation shows it.
`--cuda` measures on a card instead: a Whisper-large-v3 encoder with random weights, hours of audio a second, and the
share of the card's own bfloat16 matrix-product rate that the encoder's operations reach with everything around them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "features"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import soundfile as sf
import torch
from feature_helpers import make_shards
from safetensors.torch import save_file
from torch import Tensor

from components.features.extract import BATCH_SECONDS, extract_shard, plan_batches, read_waveform
from components.features.overlap import ahead
from components.schema import ShardInfo
from components.shards.reader import ShardReader
from components.training.precision import matmul_rate
from models.encoders import build_encoder
from models.encoders.base import SAMPLE_RATE, AudioEncoder, EncoderSpec
from models.pretrained import resolve
from tests.benchmarks.measuring import Comparison, interleaved, machine, middle, verdict

Compute = Literal["float32", "bfloat16"]
OF_BARE, OF_ONE = 0.90, 2.0
DATA = Path(__file__).parents[3] / "shared" / "data" / "librispeech_speakers"
TITLES = {"bare": "bare loop", "ours": "extraction", "one": "transformers one by one"}
MOONSHINE = "earloom/moonshine-tiny-en"
LARGE = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Audio shards in a folder, and the rows of each."""

    root: str
    shards: tuple[ShardInfo, ...]
    rows: tuple[list[Row], ...]

    @property
    def seconds(self) -> float:
        return sum(shard.seconds for shard in self.shards)

    def part(self, number: int, of: int) -> Corpus:
        """Every `of`-th shard, from `number` on."""
        return Corpus(self.root, self.shards[number::of], self.rows[number::of])


def speech() -> np.ndarray:
    """Minutes of read speech `(samples,)` int16 at 16 kHz, or as much noise where there is none: cost is the same."""
    if DATA.is_dir():
        return np.concatenate([sf.read(file, dtype="int16")[0] for file in sorted(DATA.glob("audio/*.flac"))[:40]])
    return (3000 * np.random.default_rng(0).standard_normal(500 * SAMPLE_RATE)).astype(np.int16)


def corpus(folder: Path, shards: int, clips: int, mean: float, longest: float = 30.0) -> Corpus:
    """Shards of `clips` clips whose lengths are log-normal around `mean` seconds, from 0.3 s to `longest`."""
    whole, chance = speech(), np.random.default_rng(7)
    waves: list[list[np.ndarray]] = []
    for _ in range(shards):
        lengths = np.clip(mean * np.exp(0.5 * chance.standard_normal(clips) - 0.125), 0.3, longest) * SAMPLE_RATE
        starts = [int(chance.integers(0, max(1, len(whole) - int(n)))) for n in lengths]
        waves.append([whole[start : start + int(n)] for start, n in zip(starts, lengths, strict=True)])
    audio, index = make_shards(folder / "audio", waves)
    rows = tuple([row for row in index if row["shard"] == shard.name] for shard in audio.shards)
    return Corpus(str(folder / "audio"), audio.shards, rows)


# ---- the sides: each runs in a process that keeps its encoder; they return seconds -----------------------------------

kept: dict[str, Any] = {}


def start_up(kind: str, core: int | None, threads: int, compute: Compute) -> None:
    """What is not timed: imports, weights, a first pass."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)
    if kind == "ours":
        kept["encoder"] = build_encoder(EncoderSpec(kind="moonshine", weights=MOONSHINE, compute=compute))
        with torch.inference_mode():
            kept["encoder"]([torch.zeros(SAMPLE_RATE)])
    else:
        from transformers import MoonshineForConditionalGeneration

        whole = MoonshineForConditionalGeneration.from_pretrained(resolve(MOONSHINE))
        kept["model"] = whole.model.encoder.eval()


def bare(given: Corpus) -> float:
    """The encoder on the cache's own batches of waveforms that are there."""
    loaded = kept.setdefault("loaded", {})
    for shard, rows in zip(given.shards, given.rows, strict=True):
        if shard.name not in loaded:
            loaded[shard.name] = list(in_memory(rows, given.root, "cpu"))
    began = time.perf_counter()
    with torch.inference_mode():
        for shard in given.shards:
            for batch in loaded[shard.name]:
                kept["encoder"](batch)
    return time.perf_counter() - began


def in_memory(rows: list[Row], root: str, device: str) -> list[list[Tensor]]:
    batches = plan_batches([row["samples"] for row in rows], BATCH_SECONDS[device])
    return list(ahead(partial(read_waveform, ShardReader(root)), [[rows[i] for i in batch] for batch in batches]))


def ours(given: Corpus) -> float:
    return extracted(given, kept["encoder"])


def extracted(given: Corpus, encoder: AudioEncoder) -> float:
    with tempfile.TemporaryDirectory(dir=Path(given.root).parent) as out:
        began = time.perf_counter()
        for shard, rows in zip(given.shards, given.rows, strict=True):
            extract_shard(shard, rows, given.root, encoder, out)
        return time.perf_counter() - began


def one(given: Corpus) -> float:
    """Clip by clip, as a script for a corpus of files does it."""
    reader = ShardReader(given.root)
    with tempfile.TemporaryDirectory(dir=Path(given.root).parent) as out:
        began = time.perf_counter()
        for rows in given.rows:
            for row in rows:
                waveform = torch.from_numpy(reader.waveform({**row, "audio_digest": ""}))  # a script checks nothing
                with torch.inference_mode():
                    frames = kept["model"](waveform[None]).last_hidden_state[0]
                save_file({"features": frames.bfloat16()}, f"{out}/{row['key']}.safetensors")
        return time.perf_counter() - began


def process(kind: str, core: int | None, threads: int, compute: Compute = "float32") -> ProcessPoolExecutor:
    """One worker, warm."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), start_up, (kind, core, threads, compute))
    assert pool.submit(bool, 1).result()
    return pool


# ---- the comparisons -------------------------------------------------------------------------------------------------


def against_bare(given: Corpus, core: int, rounds: int, compute: Compute) -> Comparison:
    part = Corpus(given.root, given.shards[:1], given.rows[:1])
    with process("ours", core, 1, compute) as pool, process("one", core, 1) as theirs:
        ways = {
            "bare": lambda: part.seconds / pool.submit(bare, part).result(),
            "ours": lambda: part.seconds / pool.submit(ours, part).result(),
            "one": lambda: part.seconds / theirs.submit(one, part).result(),
        }
        for way in ways.values():
            way()
        rates = interleaved(ways, rounds)
    said = ", ".join(f"{TITLES[name]} {middle(found)}" for name, found in rates.items())
    print(f"one core, x real time: {said}", flush=True)
    return Comparison(rates["bare"], rates["ours"])


def against_one(given: Corpus, cores: list[int], rounds: int, compute: Compute) -> Comparison:
    pools = [process("ours", core, 1, compute) for core in cores]
    theirs = process("one", None, len(cores))

    def all_ours() -> float:
        began = time.perf_counter()
        work = [pool.submit(ours, given.part(n, len(pools))) for n, pool in enumerate(pools)]
        for done in work:
            done.result()
        return given.seconds / (time.perf_counter() - began)

    try:
        ways = {"one": lambda: given.seconds / theirs.submit(one, given).result(), "ours": all_ours}
        for way in ways.values():
            way()
        rates = interleaved(ways, rounds)
    finally:
        for pool in [*pools, theirs]:
            pool.shutdown()
    said = ", ".join(f"{TITLES[name]} {middle(found)}" for name, found in rates.items())
    print(f"{len(cores)} cores, x real time: {said}", flush=True)
    return Comparison(rates["one"], rates["ours"])


def on_cpu(place: Path, given: argparse.Namespace) -> int:
    cores = sorted(os.sched_getaffinity(0))
    print(f"{machine()}; {given.compute}", flush=True)
    missed = 0
    for mean in given.seconds:
        made = corpus(place / f"{mean:g}", given.shards * len(cores), max(8, int(given.minutes * 60 / mean)), mean)
        print(f"\n{sum(map(len, made.rows))} clips of {mean:g} s, {made.seconds / 60:.1f} min", flush=True)
        alone = against_bare(made, cores[0], given.rounds, given.compute)
        missed += verdict(f"extraction against the bare loop, {mean:g} s", alone.ratio, OF_BARE, alone.drift)
        both = against_one(made, cores, given.rounds, given.compute)
        missed += verdict(f"extraction against one by one, {mean:g} s", both.ratio, OF_ONE, both.drift)
    return int(missed > 0)


def on_cuda(place: Path, given: argparse.Namespace) -> int:
    device = torch.device("cuda")
    peak = matmul_rate(device, torch.bfloat16)
    torch.set_float32_matmul_precision(given.precision)
    with device:
        encoder = build_encoder(EncoderSpec(kind="whisper", config=LARGE, compute=given.compute))
    made = corpus(place, given.shards, max(8, int(given.minutes * 60 / 10.0)), 10.0)
    loaded = [b for rows in made.rows for b in in_memory(rows, made.root, "cuda")]
    operations = flops(encoder, loaded)

    def loop() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in loaded:
                encoder([waveform.to(device, non_blocking=True) for waveform in batch])
        torch.cuda.synchronize()
        return made.seconds / (time.perf_counter() - began)

    ways = {"bare": loop, "ours": lambda: made.seconds / extracted(made, encoder)}
    for way in ways.values():
        way()
    rates = interleaved(ways, given.rounds)
    print(f"{machine(device)}; {given.compute}, of float32 matmul precision {given.precision}")
    print(f"bfloat16 products of 8192 x 8192: {peak / 1e12:.1f} Tflop/s")
    for name, found in rates.items():
        share = operations * statistics.median(found) / made.seconds / peak
        hours = [rate / 3600 for rate in found]
        print(f"{name}: {middle(hours, '.3f')} hours of audio a second, {share:.1%} of that peak", flush=True)
    compared = Comparison(rates["bare"], rates["ours"])
    return verdict("extraction against the bare loop, on a card", compared.ratio, OF_BARE, compared.drift)


def flops(encoder: AudioEncoder, batches: list[list[Tensor]]) -> int:
    """Floating-point operations of one pass over all batches, padding included."""
    from torch.utils.flop_counter import FlopCounterMode

    device = encoder.device
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for batch in batches:
            encoder([waveform.to(device) for waveform in batch])
    return int(counter.get_total_flops())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.0, 10.0], help="mean length of clips")
    parser.add_argument("--minutes", type=float, default=10.0, help="of audio in a shard")
    parser.add_argument("--shards", type=int, default=1, help="for each core, or in all on a card")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", choices=["float32", "bfloat16"], default="float32", help="of our encoder")
    parser.add_argument("--cuda", action="store_true", help="on a card")
    parser.add_argument(
        "--precision", choices=["highest", "high", "medium"], default="high", help="of float32 on a card"
    )
    given = parser.parse_args()
    if given.cuda and not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="cache-speed.") as place:
        return on_cuda(Path(place), given) if given.cuda else on_cpu(Path(place), given)


if __name__ == "__main__":
    raise SystemExit(main())
