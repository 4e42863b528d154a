"""Ingest against lhotse's Shar export, and against its own bare kernels: `python -m tests.benchmarks.ingest_speed`.

The same files, two worker processes each, the same target (16 kHz FLAC in tars; `original` where bytes are kept). The
sides take turns in fresh processes; each reports the seconds of its own work, without imports and without looking for
the files. Ours also checks and digests every clip, and leaves an index, a manifest and sha256 of each shard.

With `--flow` only the stage is measured, on Opus files of about a minute of work under so many names: `earloom ingest`
as a person calls it, from the shell's prompt to the next, with Prefect's server, Ray and the data set's page, against
the same kernels in two bare processes.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import soundfile as sf
import soxr

from components.audio.split import assign_splits
from components.schema import Annotation, Recording
from components.shards.group import Keyed, plan_groups
from components.shards.ingest import ingest_group
from components.shards.publish import publish
from components.shards.settings import Ingest
from tests.benchmarks.measuring import Comparison, interleaved, machine, middle, verdict

DATA = Path(__file__).parents[3] / "shared" / "data" / "librispeech_speakers"
PER_SHARD = 250
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


# ---- the sides: each is run in a process of its own, and prints its seconds ------------------------------------------


def ours(folder: Path, out: Path, jobs: int, settings: Ingest) -> float:
    from components.digest import digest_file

    files = sorted(folder.iterdir())
    noted = [Annotation(id=file.stem, text="the words of it") for file in files]
    pairs = zip(files, noted, strict=True)
    found = [Recording(url=str(file), digest=digest_file(file), annotation=note) for file, note in pairs]
    groups = plan_groups(assign_splits(found), PER_SHARD)
    began = time.perf_counter()
    work = partial(_one, root=str(out / "audio" / "v"), data=str(folder), settings=settings)
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(work, enumerate(groups)))
    manifest = publish(str(out / "audio" / "v"), "speed", "v", groups, [], str(folder), PER_SHARD, settings)
    spent = time.perf_counter() - began
    assert manifest.samples == len(files), f"{manifest.rejected} of {len(files)} were set aside"
    return spent


def _one(item: tuple[int, Sequence[Keyed]], root: str, data: str, settings: Ingest) -> None:
    ingest_group(item[0], item[1], root, data, settings)


def lhotse(folder: Path, out: Path, jobs: int, form: str) -> float:
    from lhotse import CutSet, MonoCut, SupervisionSegment
    from lhotse import Recording as Found

    cuts = []
    for file in sorted(folder.iterdir()):
        recording = Found.from_file(file)
        said = SupervisionSegment(file.stem, file.stem, 0, recording.duration, text="the words of it")
        cuts.append(MonoCut(file.stem, 0, recording.duration, 0, recording=recording, supervisions=[said]))
    whole = CutSet.from_cuts(cuts).to_eager()
    if form != "original" and cuts[0].recording.sampling_rate != 16_000:
        whole = whole.resample(16_000)
    began = time.perf_counter()
    whole.to_shar(out, fields={"recording": form}, shard_size=PER_SHARD, num_jobs=jobs)
    return time.perf_counter() - began


def flow(folder: Path, out: Path, jobs: int) -> float:
    words = ["ingest", "--arch", "funasr_llm", "--data", str(folder), "--lake", str(out), "preset=tiny"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words, f"cpus={jobs}", f"per_shard={PER_SHARD}"],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


SIDES: dict[str, Callable[[Path, Path, int], float]] = {
    "ours": partial(ours, settings=Ingest()),
    "ours-trust": partial(ours, settings=Ingest(trust=True)),
    "flow": flow,
    "lhotse-flac": partial(lhotse, form="flac"),
    "lhotse-original": partial(lhotse, form="original"),
}


def run_side(name: str, folder: Path, seconds: float, jobs: int, extra: str) -> float:
    """Times real time of one side, in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{name}.") as out:
        command = [sys.executable, "-m", "tests.benchmarks.ingest_speed", "--side", name, str(folder), out, str(jobs)]
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), extra]))
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return seconds / float(done.stdout.split()[-1])


def compare(title: str, folder: Path, seconds: float, base: str, other: str, rounds: int, extra: str) -> Comparison:
    ways = {name: partial(run_side, name, folder, seconds, 2, extra) for name in (base, other)}
    found = interleaved(ways, rounds)
    compared = Comparison(found[base], found[other])
    rates = ", ".join(f"{name} {middle(found[name], ',.0f')} x real time" for name in ways)
    print(f"{title}: {compared.ratio:.2f}x; {rates}", flush=True)
    return compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lhotse", default="", help="folder that lhotse was installed to")
    parser.add_argument("--clips", type=int, default=1500, help="of 16 kHz FLAC; a tenth of them in other formats")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flow", action="store_true", help="the whole stage against its kernels, nothing else")
    parser.add_argument("--side", nargs=4, metavar=("NAME", "FROM", "TO", "JOBS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        name, folder, out, jobs = given.side
        print(SIDES[name](Path(folder), Path(out), int(jobs)))
        return 0
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    place = Path(tempfile.mkdtemp(dir=memory, prefix="ingest-speed."))
    try:
        return measure_flow(place, given.rounds) if given.flow else measure(place, given)
    finally:
        shutil.rmtree(place)


def measure_flow(place: Path, rounds: int) -> int:
    folder, names = place / "opus", 150
    seconds = corpus(folder, "opus", names)
    with tempfile.TemporaryDirectory(dir=place) as out:
        copies = max(1, round(MINUTE / ours(folder, Path(out), 2, Ingest())))
    for file in sorted(folder.iterdir()):
        for number in range(1, copies):
            os.link(file, folder / f"{file.stem}-{number}.opus")
    print(f"{machine()}; {names} Opus files under {copies} names each, {seconds * copies / 3600:.1f} hours", flush=True)
    tax = compare("stage", folder, seconds * copies, "ours", "flow", rounds, "")
    return int(verdict("stage against its kernels", tax.ratio, 0.9, tax.drift) > 0)


def measure(place: Path, given: argparse.Namespace) -> int:
    lengths = {form: corpus(place / form, form, given.clips // (1 if form == "flac" else 10)) for form in FORMS}
    print(f"{machine()}; {json.dumps({form: round(s / 3600, 2) for form, s in lengths.items()})} hours", flush=True)
    flac, seconds = place / "flac", lengths["flac"]
    missed = 0
    one = partial(run_side, "ours", flac, seconds, 1, "")
    scaled = interleaved({"one": one, "two": partial(run_side, "ours", flac, seconds, 2, "")}, given.rounds)
    print(f"one core {middle(scaled['one'], ',.0f')}, two {middle(scaled['two'], ',.0f')} x real time")
    both = Comparison(scaled["one"], scaled["two"])
    missed += verdict("two cores against one", both.ratio, 1.90, both.drift)
    if not given.lhotse:
        print("no --lhotse FOLDER: nothing to compare with")
        return int(missed > 0)
    verified = compare("verified", flac, seconds, "lhotse-flac", "ours", given.rounds, given.lhotse)
    missed += verdict("verified ingest against lhotse", verified.ratio, 3.0, verified.drift)
    kept = compare("bytes kept", flac, seconds, "lhotse-original", "ours-trust", given.rounds, given.lhotse)
    missed += verdict("pass-through against lhotse", kept.ratio, 12.0, kept.drift)
    coded = [
        compare(form, place / form, lengths[form], "lhotse-flac", "ours", given.rounds, given.lhotse)
        for form in ("mp3", "opus", "wav")
    ]
    mean, drift = geometric_mean([found.ratio for found in coded]), max(found.drift for found in coded)
    missed += verdict("transcoding against lhotse", mean, 1.8, drift)
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
