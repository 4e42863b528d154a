"""Ingest against lhotse's Shar export, and against its own bare kernels: `python -m tests.benchmarks.ingest_speed`.

The same files, two worker processes each on two cores, the same target (16 kHz FLAC in tars; `original` where bytes
are kept). The sides take turns in fresh processes. `whole` is a process from its start to its end: imports, looking for
the files and starting workers included, on both sides. `work` is what remains without these, as with very many files.
The bar of kept bytes is for the work, the others for the whole: 1,500 files are copied before imports are paid for.
Ours also checks and digests every clip, and leaves an index, a manifest and sha256 of each shard.

With `--flow` only the stage is measured, on Opus files of about a minute of work under so many names: `earloom ingest`
as a person calls it, from the shell's prompt to the next, with Prefect, Ray and the data set's page, against the same
kernels in two bare processes; once with a Prefect server that runs already, as a team has, and once without.

lhotse is not a dependency: `pip install --target FOLDER --no-deps lhotse intervaltree cytoolz lilcom sortedcontainers
toolz tabulate audioread`, and name the folder with --lhotse. NeMo's script needs the whole toolkit and is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np
import soundfile as sf
import soxr

from infra import services
from tests.benchmarks.ingest_sides import ours
from tests.benchmarks.measuring import Comparison, environment, interleaved, machine, middle, verdict

DATA = Path(__file__).parents[3] / "shared" / "data" / "librispeech_speakers"
MINUTE = 60  # seconds of work for the whole stage
FORMS = {"flac": (16_000, "FLAC", None), "wav": (44_100, "WAV", None), "mp3": (44_100, "MP3", None)}
FORMS["opus"] = (48_000, "OGG", "OPUS")


def speech() -> np.ndarray:
    """Minutes of read speech, `(samples,)` at 16 kHz: real where there is some, else the demo's voices."""
    if DATA.is_dir():
        return np.concatenate([sf.read(file, dtype="float32")[0] for file in sorted(DATA.glob("audio/*.flac"))[:40]])
    from components.corpus.speak import speak_corpus

    with tempfile.TemporaryDirectory() as folder:
        speak_corpus(Path(folder), clips=60)
        voices = [sf.read(file, dtype="float32") for file in sorted(Path(folder).glob("audio/*.flac"))]
        return np.concatenate([soxr.resample(samples, rate, 16_000) for samples, rate in voices])


def corpus(folder: Path, form: str, clips: int) -> float:
    """Writes so many files of 5 to 20 s, cut at random and at random gains; returns their seconds in all."""
    rate, container, subtype = FORMS[form]
    whole, chance, total = speech(), np.random.default_rng(7), 0.0
    folder.mkdir(parents=True)
    for number in range(clips):
        length = int(chance.uniform(5, 20) * 16_000)
        start = int(chance.integers(0, max(1, len(whole) - length)))
        samples = np.fromiter(islice(cycle(whole[start : start + length]), length), np.float32, length)
        samples -= samples.mean()
        samples *= np.float32(chance.uniform(0.3, 0.9) / max(1e-3, float(np.abs(samples).max())))
        if rate != 16_000:
            samples = soxr.resample(samples, 16_000, rate)
        sf.write(folder / f"clip{number:05d}.{form}", samples, rate, format=container, subtype=subtype)
        total += length / 16_000
    return total


class Rate(NamedTuple):
    """Times real time: of a side's work, and of its whole process."""

    work: float
    whole: float


def run_side(name: str, folder: Path, seconds: float, jobs: int, extra: str) -> Rate:
    """What one side does with `seconds` of audio, in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as out:
        command = [sys.executable, "-m", "tests.benchmarks.ingest_sides", name, str(folder), out, str(jobs)]
        own = environment(str(Path(__file__).parents[2]), extra)
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=own)
        whole = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return Rate(seconds / float(done.stdout.split()[-1]), seconds / whole)


class Compared(NamedTuple):
    """As `Rate`."""

    work: Comparison
    whole: Comparison


def compare(title: str, folder: Path, seconds: float, base: str, other: str, rounds: int, extra: str) -> Compared:
    """Two sides against each other; both ratios are printed."""
    ways = {name: partial(run_side, name, folder, seconds, 2, extra) for name in (base, other)}
    found = interleaved(ways, rounds)
    compared = []
    for part in Rate._fields:
        rates = {name: [getattr(rate, part) for rate in found[name]] for name in ways}
        compared.append(Comparison(rates[base], rates[other]))
        said = ", ".join(f"{name} {middle(rates[name], ',.0f')} x real time" for name in ways)
        print(f"{title}, {part}: {compared[-1].ratio:.2f}x; {said}", flush=True)
    return Compared(*compared)


def touch_memory(folder: Path, share: float = 0.5) -> None:
    """Use free memory once: a virtual machine gets it from its host at first use, which would be the first side's."""
    import psutil

    filler, block = folder / "filler", bytes(64 << 20)
    with open(filler, "wb") as file:
        for _ in range(int(psutil.virtual_memory().available * share) // len(block)):
            file.write(block)
    filler.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lhotse", default="", help="folder that lhotse was installed to")
    parser.add_argument("--clips", type=int, default=1500, help="of 16 kHz FLAC; a tenth of them in other formats")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flow", action="store_true", help="the whole stage against its kernels, nothing else")
    given = parser.parse_args()
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    place = Path(tempfile.mkdtemp(dir=memory, prefix="ingest-speed."))
    if memory:
        touch_memory(place)
    try:
        return measure_flow(place, given.rounds) if given.flow else measure(place, given)
    finally:
        shutil.rmtree(place)


def measure_flow(place: Path, rounds: int) -> int:
    folder, names = place / "opus", 150
    seconds = corpus(folder, "opus", names)
    copies = 1
    for _ in range(3):  # the first also imports, and few files do not fill two processes
        with tempfile.TemporaryDirectory(dir=place) as out:
            spent = ours(folder, Path(out), 2)
        more = round(copies * MINUTE / spent)
        for file in sorted(folder.glob("clip?????.opus")):
            for number in range(copies, more):
                os.link(file, folder / f"{file.stem}-{number}.opus")
        copies = max(copies, more)
    print(f"{machine()}; {names} Opus files under {copies} names each, {seconds * copies / 3600:.1f} hours", flush=True)
    os.environ["EARLOOM_USE_UP"] = "0"
    server = services.start_prefect(place / "home")
    try:
        os.environ["PREFECT_API_URL"] = server.url
        tax = compare("stage, Prefect's server running", folder, seconds * copies, "ours", "flow", rounds, "").whole
    finally:
        services.stop(server)
        del os.environ["PREFECT_API_URL"]
    compare("stage, with a server of its own", folder, seconds * copies, "ours", "flow", rounds, "")
    return int(verdict("stage against its kernels, Prefect's server running", tax.ratio, 0.9, tax.drift) > 0)


def measure(place: Path, given: argparse.Namespace) -> int:
    lengths = {form: corpus(place / form, form, given.clips // (1 if form == "flac" else 10)) for form in FORMS}
    print(f"{machine()}; {json.dumps({form: round(s / 3600, 2) for form, s in lengths.items()})} hours", flush=True)
    flac, seconds = place / "flac", lengths["flac"]
    missed = 0
    one = partial(run_side, "ours", flac, seconds, 1, "")
    found = interleaved({"one": one, "two": partial(run_side, "ours", flac, seconds, 2, "")}, given.rounds)
    cores = {name: [rate.work for rate in rates] for name, rates in found.items()}
    print(f"one core {middle(cores['one'], ',.0f')}, two {middle(cores['two'], ',.0f')} x real time")
    both = Comparison(cores["one"], cores["two"])
    missed += verdict("two cores against one", both.ratio, 1.90, both.drift)
    if not given.lhotse:
        print("no --lhotse FOLDER: nothing to compare with")
        return int(missed > 0)
    verified = compare("verified", flac, seconds, "lhotse-flac", "ours", given.rounds, given.lhotse).whole
    missed += verdict("verified ingest against lhotse", verified.ratio, 3.0, verified.drift)
    kept = compare("bytes kept", flac, seconds, "lhotse-original", "ours-trust", given.rounds, given.lhotse).work
    missed += verdict("work of pass-through against lhotse", kept.ratio, 12.0, kept.drift)
    coded = [
        compare(form, place / form, lengths[form], "lhotse-flac", "ours", given.rounds, given.lhotse).whole
        for form in ("mp3", "opus", "wav")
    ]
    mean, drift = geometric_mean([found.ratio for found in coded]), max(found.drift for found in coded)
    missed += verdict("transcoding against lhotse", mean, 1.8, drift)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
