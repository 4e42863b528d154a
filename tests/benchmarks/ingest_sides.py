"""The sides of `tests.benchmarks.ingest_speed`, each run in a process of its own: prints the seconds of its work.

`python -m tests.benchmarks.ingest_sides NAME FROM TO JOBS`. What a side does not need it does not import.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

PER_SHARD = 250


def ours(folder: Path, out: Path, jobs: int, trust: bool = False) -> float:
    from components.audio.identity import digest_at
    from components.audio.split import assign_splits
    from components.schema import Annotation, Recording
    from components.shards.group import in_turn, plan_groups
    from components.shards.ingest import ingest_group
    from components.shards.publish import publish
    from components.shards.settings import Ingest

    settings = Ingest(trust=trust)
    files = sorted(folder.iterdir())
    shares = [files[start : start + 100] for start in range(0, len(files), 100)]
    with ThreadPoolExecutor(jobs) as pool:
        known = pool.map(lambda share: [digest_at(str(file), trust) for file in share], shares)
        digests = list(chain.from_iterable(known))
    noted = [Annotation(id=file.stem, text="the words of it") for file in files]
    listed = zip(files, digests, noted, strict=True)
    found = [Recording(url=str(file), digest=digest, annotation=note) for file, digest, note in listed]
    groups = plan_groups(assign_splits(found), PER_SHARD)
    began = time.perf_counter()
    root, data = str(out / "audio" / "v"), str(folder)
    with ProcessPoolExecutor(jobs) as workers:
        order = in_turn(groups, jobs)  # as pipelines/ingest.py does
        made = [workers.submit(ingest_group, i, groups[i], root, data, settings) for i in order]
        for one in made:
            one.result()
    manifest = publish(root, "speed", "v", groups, [], data, PER_SHARD, settings)
    spent = time.perf_counter() - began
    assert manifest.samples == len(files), f"{manifest.rejected} of {len(files)} were set aside"
    return spent


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
    "ours": ours,
    "ours-trust": partial(ours, trust=True),
    "flow": flow,
    "lhotse-flac": partial(lhotse, form="flac"),
    "lhotse-original": partial(lhotse, form="original"),
}


if __name__ == "__main__":
    name, source, target, cores = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):  # one process with threads would be on more than one core
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    print(SIDES[name](Path(source), Path(target), int(cores)))
    gc.freeze()  # as the command line does: to look for cycles in all that was imported takes longer than the exit
