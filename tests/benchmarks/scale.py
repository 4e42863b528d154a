"""A million rows and ten thousand clips, from ingest to trace, within 4 GB: `python -m tests.benchmarks.scale`.

First a manifest of `--rows` segments of long recordings is read, grouped as ingest groups it, and given records of
finished shards with made-up rows: texts, speakers, durations, digests and fingerprints as real columns have them, with
duplicates, near duplicates and leaks among them. From there the project's own code goes on: publish with every check,
the index, the page, the plan of a stage, and trace. Then real clips are ingested by two processes, all under names of
their own. Every step is a process of its own, and its peak of memory is printed. The program fails above 4 GB, or where
a worker's memory grows with the number of files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from components.audio.sources import read_sources
from components.audio.split import assign_splits
from components.schema import Recording, Reject
from components.shards.group import PER_SHARD, Keyed, plan_groups, set_duplicates_aside
from components.shards.index import read_index, read_rows
from components.shards.ingest import ingest_config, ingest_group
from components.shards.publish import audio_root, dataset_version, publish
from components.shards.settings import Ingest
from infra.storage import local_path
from tests.benchmarks.scale_rows import write_manifest, write_parts

LIMIT = 4 * 10**9  # bytes that any step may take
PER_FILE = 2048  # bytes by which the driver may grow with each file, while shards are made
GROWTH = 0.10  # of a worker's memory, from a quarter of the clips to all of them
SETTINGS = Ingest(duplicates="near", leak_speakers=True, leak_sentences=True)
FOLDERS = ("fsdd", "emodb")  # real clips, in ../shared/data
CLIPS = 500  # different ones, each under many names


class Step(NamedTuple):
    """What a step took, and what it says of itself; memory in bytes."""

    name: str
    seconds: float
    busy: float  # seconds of the processor, which do not depend on who else is there
    peak: int
    base: int  # after imports
    said: dict[str, Any]


def memory(field: str = "VmHWM") -> int:
    """Bytes of this process: `VmHWM`, the most so far, or `VmRSS`, now. getrusage would count the parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# ---- a million rows -------------------------------------------------------------------------------------------------


def looked(data: str) -> tuple[list[Recording], list[Reject], str]:
    """What the ingest stage knows before it begins: recordings, rejects, and the version."""
    found, rejects = read_sources(data)
    found = assign_splits(found, drain=True)
    return found, rejects, dataset_version(found, rejects, ingest_config(PER_SHARD, SETTINGS), data)


def grouped(folder: Path) -> tuple[list[list[Keyed]], list[Reject], str]:
    data = str(folder / "data")
    recordings, rejects, version = looked(data)
    kept, doubled = set_duplicates_aside(recordings, data)
    return plan_groups(kept), [*rejects, *doubled], version


def sources_step(folder: Path) -> dict[str, Any]:
    recordings, rejects, version = looked(str(folder / "data"))
    return {"recordings": len(recordings), "rejects": len(rejects), "version": version}


def parts_step(folder: Path) -> dict[str, Any]:
    groups, _, version = grouped(folder)
    write_parts(audio_root(str(folder / "lake"), "scale", version), groups, str(folder / "data"), SETTINGS)
    return {"shards": len(groups)}


def publish_step(folder: Path) -> dict[str, Any]:
    """All that the driver of an ingest does, with its recordings in memory, but for the shards themselves."""
    groups, rejects, version = grouped(folder)
    lake, data = str(folder / "lake"), str(folder / "data")
    held = memory("VmRSS")
    manifest = publish(audio_root(lake, "scale", version), "scale", version, groups, rejects, data, settings=SETTINGS)
    return {"samples": manifest.samples, "aside": manifest.asides, "before publish, MB": held >> 20}


def root_of(folder: Path) -> str:
    (manifest,) = folder.glob("lake/audio/scale/*/manifest.json")
    return str(manifest.parent)


def index_step(folder: Path) -> dict[str, Any]:
    return {"rows": read_index(root_of(folder)).num_rows}


def page_step(folder: Path) -> dict[str, Any]:
    from components.datacard.card import write_card

    return {"bytes": local_path(write_card(root_of(folder))).stat().st_size}


def plan_step(folder: Path) -> dict[str, Any]:
    """A stage of two tasks and three epochs, easy clips first, as the first training worker plans it."""
    from components.batching.stage_plan import lengths_only, open_plan, publish_plan
    from models.recipe import Curriculum
    from models.rendering import Audio
    from tests.training.training_helpers import built, make_stage

    parts, rows = built(), read_rows(root_of(folder)).where("split", "train")
    order = Curriculum(order="duration", pacing="root", epochs=1)
    stage = make_stage(name="scale", tasks={"asr": 1.0, "labels": 0.5}, epochs=3.0, batch_tokens=4096, curriculum=order)
    heard = Audio(lengths_only({"speech": 50}))
    found = publish_plan(str(folder / "stage"), stage, rows, parts.model, parts.tokenizer, lambda _: heard, 0, "packed")
    data = open_plan(str(folder / "stage"), stage, rows, parts.model, parts.tokenizer, lambda _: heard)
    first = [data.sample(int(number)).key for number in data.plan.batch(len(data.plan) // 2)]
    return {"samples": len(data.samples), "steps": found.steps, "batch": len(first)}


def trace_step(folder: Path, kind: Any, name: str) -> dict[str, Any]:
    from components.registry.graph import read_graph
    from components.registry.search import Subject
    from components.registry.trace import forward

    (part,) = forward(read_graph(str(folder / "lake")), Subject(kind, name)).audio
    return {"clips": part.clips, "dropped": part.dropped, "shards": len(part.shards), "files": part.files}


# ---- real clips -----------------------------------------------------------------------------------------------------


def real_clips() -> list[Path]:
    """Short recordings of ../shared/data; the demo's voices where there are none."""
    data = Path(__file__).parents[3] / "shared" / "data"
    found = [file for name in FOLDERS for file in sorted((data / name / "audio").glob("*"))][:CLIPS]
    if found:
        return found
    from components.corpus.speak import speak_corpus

    spoken = Path(tempfile.mkdtemp(prefix="scale."))
    speak_corpus(spoken, clips=60)
    return sorted(spoken.glob("audio/*.flac"))


def link_clips(folder: Path, clips: int) -> None:
    """So many clips under names of their own, with a manifest."""
    folder.mkdir(parents=True)
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as manifest:
        for number, file in enumerate(islice(cycle(real_clips()), clips)):
            name = f"{number:06d}{file.suffix}"
            try:
                os.link(file, folder / name)
            except OSError:  # another disk
                (folder / name).write_bytes(file.read_bytes())
            fields = {
                "audio": name,
                "text": "what is said in it",
                "speaker": f"speaker-{number % 50}",
                "language": "en",
            }
            manifest.write(json.dumps(fields) + "\n")


def ingest_step(folder: Path) -> dict[str, Any]:
    """The whole ingest of `folder/data` by two processes, shard by shard."""
    groups, rejects, version = grouped(folder)
    data, root = str(folder / "data"), audio_root(str(folder / "lake"), "scale", version)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        workers = Counter[int]()
        for process, peak in pool.map(partial(one_shard, root=root, data=data), enumerate(groups)):
            workers[process] = max(workers[process], peak)
    driver = memory()
    manifest = publish(root, "scale", version, groups, rejects, data, settings=SETTINGS)
    different = len({os.stat(keyed.recording.url).st_ino for group in groups for keyed in group})
    return {
        "samples": manifest.samples,
        "aside": manifest.asides,
        "different": different,
        "driver": driver,
        "workers": sorted(workers.values()),
    }


def one_shard(item: tuple[int, Sequence[Keyed]], root: str, data: str) -> tuple[int, int]:
    """Ingests a group; which process did, and its peak of memory so far."""
    ingest_group(item[0], item[1], root, data, SETTINGS)
    return os.getpid(), memory()


# ---- steps as processes ---------------------------------------------------------------------------------------------

ROW_STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sources": sources_step,
    "parts": parts_step,
    "publish": publish_step,
    "index": index_step,
    "page": page_step,
    "plan": plan_step,
    "trace speaker": partial(trace_step, kind="speaker", name="speaker-0123"),
    "trace file": partial(trace_step, kind="file", name="talk-00007.flac"),
    "trace clip": partial(trace_step, kind="clip", name="talk-00007-12"),
}
STEPS = ROW_STEPS | {"ingest": ingest_step}


def run_step(name: str, folder: Path) -> Step:
    """A step in a fresh process. RuntimeError if it fails."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--step", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return Step(**json.loads(done.stdout.splitlines()[-1]))


def measured(name: str, folder: Path) -> Step:
    """The step in this process."""
    base, began, busy = memory(), time.perf_counter(), time.process_time()
    said = STEPS[name](folder)
    return Step(name, time.perf_counter() - began, time.process_time() - busy, memory(), base, said)


def shown(step: Step) -> str:
    said = ", ".join(f"{name} {value}" for name, value in step.said.items())
    times, sizes = f"{step.seconds:>9.1f}{step.busy:>9.1f}", f"{step.peak / 1e9:>9.2f}{step.base / 1e9:>7.2f}"
    return f"{step.name:<14}{times}{sizes}   {said}"


def rows_part(folder: Path, rows: int) -> list[Step]:
    """All steps on so many rows, printed one by one."""
    write_manifest(folder / "data", rows)
    found = []
    for name in ROW_STEPS:
        found.append(run_step(name, folder))
        print(shown(found[-1]), flush=True)
    return found


def clips_part(folder: Path, clips: int) -> tuple[Step, Step]:
    """A quarter of the clips, and all of them."""
    found = []
    for count in (clips // 4, clips):
        place = folder / f"clips-{count}"
        link_clips(place / "data", count)
        found.append(run_step("ingest", place))
        print(shown(found[-1]), flush=True)
    return found[0], found[1]


def faults_of(few: Step, many: Step, files: int) -> list[str]:
    """What breaks the promise between two ingests of which the second has `files` more."""
    worker = max(many.said["workers"]) / max(few.said["workers"]) - 1
    each, row = (many.said["driver"] - few.said["driver"]) / files, (many.peak - few.peak) / files
    print(f"a worker's memory grew by {worker:.1%}; the driver's by {each:,.0f} bytes a file, in publish by {row:,.0f}")
    faults = []
    if worker > GROWTH:
        faults.append(f"a worker's memory grew by {worker:.0%} with the number of files, at most {GROWTH:.0%}")
    if each > PER_FILE:
        faults.append(f"the driver's memory grew by {each:,.0f} bytes a file, at most {PER_FILE:,}")
    if many.said["samples"] > many.said["different"]:
        faults.append(f"{many.said['samples']} samples of {many.said['different']} different files: copies were kept")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to work, with room for 4 GB; else a temporary one")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(measured(given.step, given.folder)._asdict()))
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="scale.") as place:
        print(f"{given.rows:,} rows, {given.clips:,} clips\n{'step':<14}  seconds     busy  peak GB  after imports")
        steps = rows_part(Path(place), given.rows) if given.rows else []
        ingests = clips_part(Path(place), given.clips) if given.clips else ()
    faults = [f"{step.name} took {step.peak / 1e9:.2f} GB" for step in (*steps, *ingests) if step.peak > LIMIT]
    faults += faults_of(*ingests, files=given.clips - given.clips // 4) if ingests else []
    print("\n".join([*faults, "MISSED" if faults else "every step within 4 GB: met"]))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
