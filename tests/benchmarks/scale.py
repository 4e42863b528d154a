"""One million rows and ten thousand clips through ingest, plan and trace within 4 GB: `python -m tests.benchmarks.scale`.

First a manifest of `--rows` segments of long recordings is read, grouped as ingest groups it, and given records of
finished shards with made-up rows: texts, speakers, durations, digests and fingerprints as real columns have them, with
duplicates, near duplicates and leaks among them. From there the project's own code goes on: publish with every check,
the index, the page, the plan of a stage, and trace. Then real clips are ingested by two processes, all under names of
their own. Every step is a process of its own; what is printed is its peak of memory (VmHWM), and what it had after
its imports. It fails above 4 GB, or where a worker's memory grows with the number of files.
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

import numpy as np

from components.audio.fingerprint import HOP_SECONDS
from components.audio.sources import read_sources
from components.audio.split import assign_splits
from components.schema import SAMPLE_RATE, Recording, Reject, ShardInfo
from components.seal import sealed
from components.shards.group import PER_SHARD, Keyed, plan_groups, set_duplicates_aside
from components.shards.index import SampleRow, read_index, read_rows
from components.shards.ingest import ingest_config, ingest_group
from components.shards.parts import Part, group_digest, part_url, shard_name
from components.shards.publish import audio_root, dataset_version, publish
from components.shards.settings import Ingest
from infra.storage import join, local_path, write_bytes

LIMIT = 4 << 30  # bytes that any step may take
PER_FILE = 2048  # bytes by which the driver of an ingest may grow with each file
GROWTH = 0.10  # of a worker's memory, from a quarter of the clips to all of them
SEGMENTS = 100  # of one long recording
SPEAKERS = 5000
COPIES = 0.01  # of the rows have the samples of an earlier one, and as many its sound
SETTINGS = Ingest(duplicates="near", leak_speakers=True, leak_sentences=True)
WORDS = (
    *("the", "a", "of", "and", "to", "light", "kitchen", "weather", "tomorrow", "train", "song", "water", "plants"),
    *("open", "window", "minutes", "until", "next", "Straße", "play", "again", "remind", "me", "please", "in", "is"),
)
FOLDERS = ("fsdd", "emodb")  # real clips, in ../shared/data
CLIPS = 500  # different ones, each under many names


class Step(NamedTuple):
    """What a step took, and what it says of itself; memory in bytes."""

    name: str
    seconds: float
    peak: int
    base: int  # after imports
    said: dict[str, Any]


def memory(field: str = "VmHWM") -> int:
    """Bytes of this process: `VmHWM`, the most so far, or `VmRSS`, now. getrusage would count the parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# ---- a million rows -------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, rows: int) -> None:
    """`manifest.jsonl` of so many segments, and the files that they are cut from, which nobody decodes here."""
    drawn = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-rows // SEGMENTS)):
        (folder / f"talk-{number:05d}.flac").write_bytes(f"recording {number}".encode())
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            words = drawn.integers(0, len(WORDS), (count, 12))
            ends = drawn.integers(3, 13, count)
            seconds = drawn.uniform(2, 15, count).round(2)
            speakers = drawn.integers(0, SPEAKERS, count)
            for i in range(count):
                row, speaker = start + i, int(speakers[i])
                split = "train" if speaker % 20 else "test"
                fields = {
                    "id": f"talk-{row // SEGMENTS:05d}-{row % SEGMENTS:02d}",
                    "audio": f"talk-{row // SEGMENTS:05d}.flac",
                    "offset": row % SEGMENTS * 15.0,
                    "duration": float(seconds[i]),
                    "text": " ".join(WORDS[word] for word in words[i, : ends[i]]),
                    "language": "en",
                    "speaker": f"speaker-{speaker:04d}",
                    "split": "dev" if row % 1000 == 7 else split,  # of speakers who are elsewhere as well: leaks
                    "labels": {"take": row % 7},
                    "source": "made up",
                    "licence": "CC0-1.0",
                }
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def looked(data: str) -> tuple[list[Recording], list[Reject], str]:
    """What the ingest stage knows before it begins: recordings, rejects, and the version."""
    found, rejects = read_sources(data)
    recordings = assign_splits(found)
    return recordings, rejects, dataset_version(recordings, rejects, ingest_config(PER_SHARD, SETTINGS), data)


def grouped(folder: Path) -> tuple[list[list[Keyed]], list[Reject], str]:
    data = str(folder / "data")
    recordings, rejects, version = looked(data)
    kept, doubled = set_duplicates_aside(recordings, data)
    return plan_groups(kept), [*rejects, *doubled], version


def sources_step(folder: Path) -> dict[str, Any]:
    recordings, rejects, version = looked(str(folder / "data"))
    return {"recordings": len(recordings), "rejects": len(rejects), "version": version}


def parts_step(folder: Path) -> dict[str, Any]:
    """Records of finished shards with made-up rows, and tars of the right size that hold nothing."""
    data = str(folder / "data")
    groups, _, version = grouped(folder)
    root = audio_root(str(folder / "lake"), "scale", version)
    local_path(root).mkdir(parents=True, exist_ok=True)
    prints = Prints()
    for number, group in enumerate(groups):
        rows = tuple(made_up(keyed, shard_name(number), place, prints) for place, keyed in enumerate(group))
        seconds, size = sum(row.seconds for row in rows), 150_000 * len(rows)
        with open(join(root, shard_name(number)), "wb") as tar:
            tar.truncate(size)
        shard = ShardInfo(
            name=shard_name(number), sha256="0" * 64, bytes=size, samples=len(rows), seconds=round(seconds, 4)
        )
        noted = {"sources": {"made up": len(rows)}, "licences": {"CC0-1.0": len(rows)}, "rejects": ()}
        part = Part(inputs=group_digest(group, data, SETTINGS), shard=shard, rows=rows, **noted)
        write_bytes(part_url(root, number), sealed(part))
    return {"shards": len(groups), "root": root}


class Prints:
    """Digests and fingerprints of made-up audio: mostly new, at times those of the row before last."""

    def __init__(self) -> None:
        self.drawn = np.random.default_rng(2)
        self.latest: list[tuple[str, np.ndarray, float]] = []

    def next(self, seconds: float) -> tuple[str, np.ndarray, float]:
        chance = self.drawn.random()
        digest = self.drawn.bytes(32).hex()
        if chance < 2 * COPIES and len(self.latest) == 2:
            before, hashes, seconds = self.latest[0]
            if chance >= COPIES:  # a near duplicate: another digest, and one bit turned in every other hash
                turned = np.uint32(1) << self.drawn.integers(0, 32, len(hashes), dtype=np.uint32)
                hashes = hashes ^ np.where(np.arange(len(hashes)) % 2, turned, 0).astype(np.uint32)
            return (before if chance < COPIES else digest), hashes, seconds
        hashes = self.drawn.integers(1, 1 << 32, int(seconds / HOP_SECONDS), dtype=np.uint32)
        self.latest = [*self.latest[-1:], (digest, hashes, seconds)]
        return self.latest[-1]


def made_up(keyed: Keyed, shard: str, place: int, prints: Prints) -> SampleRow:
    """The row that ingest would write of a recording, without its audio."""
    recording, noted = keyed.recording, keyed.recording.annotation
    digest, hashes, seconds = prints.next(recording.duration or 1.0)
    return SampleRow(
        key=keyed.key,
        id=noted.id,
        shard=shard,
        audio_offset=150_000 * place + 512,
        audio_size=140_000 + place,
        json_offset=150_000 * place + 141_824,
        json_size=700,
        seconds=seconds,
        samples=round(seconds * SAMPLE_RATE),
        text=noted.text,
        text_length=len(noted.text or ""),
        language=noted.language,
        speaker=noted.speaker,
        gender=noted.gender,
        split=noted.split,
        labels=json.dumps(noted.labels),
        translation="{}",
        caption=None,
        audio_digest=digest,
        original=recording.url.rpartition("/")[2],
        marks="[]",
        conversations="null",
        source_digest=recording.digest,
        start=recording.start,
        fingerprint=tuple(hashes.tolist()),
    )


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
    table = read_index(root_of(folder))
    return {"rows": table.num_rows, "MB": table.nbytes >> 20}


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
    stage = make_stage(
        name="scale", tasks={"asr": 1.0, "labels": 0.5}, epochs=3.0, batch_tokens=4096, curriculum=order
    )
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
            fields = {"audio": name, "text": "what is said in it", "speaker": f"speaker-{number % 50}", "language": "en"}
            manifest.write(json.dumps(fields) + "\n")


def ingest_step(folder: Path) -> dict[str, Any]:
    """The whole ingest of `folder/data` by two processes, shard by shard."""
    groups, rejects, version = grouped(folder)
    data, root = str(folder / "data"), audio_root(str(folder / "lake"), "scale", version)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        workers = Counter[int]()
        for process, peak in pool.map(partial(one_shard, root=root, data=data), enumerate(groups)):
            workers[process] = max(workers[process], peak)
    manifest = publish(root, "scale", version, groups, rejects, data, settings=SETTINGS)
    files = [Path(keyed.recording.url) for group in groups for keyed in group]
    different = len({file.stat().st_ino if file.stat().st_nlink > 1 else file for file in files})
    return {
        "samples": manifest.samples,
        "aside": manifest.asides,
        "different": different,
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
    base, began = memory(), time.perf_counter()
    said = STEPS[name](folder)
    return Step(name, round(time.perf_counter() - began, 2), memory(), base, said)


def shown(step: Step) -> str:
    said = ", ".join(f"{name} {value}" for name, value in step.said.items())
    return f"{step.name:<14}{step.seconds:>9.1f} s{step.peak / 1e9:>8.2f} GB{step.base / 1e9:>8.2f} GB   {said}"


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
    each = (many.peak - few.peak) / files
    print(f"a worker's memory grew by {worker:.1%}, the driver's by {each:,.0f} bytes a file")
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
        print(f"{given.rows:,} rows; {'step':<14}seconds, peak, after imports")
        steps = rows_part(Path(place), given.rows) if given.rows else []
        ingests = clips_part(Path(place), given.clips) if given.clips else ()
    faults = [f"{step.name} took {step.peak / 1e9:.2f} GB" for step in (*steps, *ingests) if step.peak > LIMIT]
    faults += faults_of(*ingests, files=given.clips - given.clips // 4) if ingests else []
    print("\n".join([*faults, "MISSED" if faults else "every step within 4 GB: met"]))
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
