"""Every system, `small`, on one mixed set of real recordings: `python -m tests.benchmarks.side_by_side [NAME ...]`.

The set is cut out of ../shared/data: digits, emotions and voices of actors, sound events with captions, read sentences,
and phrases with translations; its splits hold out speakers or sentences as the sources do. Each system runs the whole
chain by its own recipe, in a process of its own, on all cores. Systems made for recognition are judged by the
transcripts that they get wholly right, the others by the labels, over all clips of the test split; beside it stands
what the untrained model gets right, and always giving each task's most frequent answer, and how long training took.
docs/side_by_side.md keeps the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components.evaluation.metrics import Scores
from models.architectures import load, names
from tests.benchmarks.measuring import machine

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
LIMIT = 300  # seconds that training may take
RECOGNISERS = ("cosmic", "funasr_llm", "llasm", "seed_asr", "slm", "speech_llama", "speechgpt")
Row = dict[str, Any]


def label(row: Row, **labels: Any) -> Row:
    return row | {"labels": {name: value for name, value in labels.items() if value}}


def digits(row: Row) -> Row:
    return label(row, digit=row["text"])


def actors(row: Row) -> Row:
    """Test speakers are a woman and, from the dev split, a man."""
    split = "test" if row["split"] == "dev" else row["split"]
    return label(row, emotion=row["labels"]["emotion"], voice=row["gender"]) | {"split": split}


def events(row: Row) -> Row | None:
    common = ("animal", "percussion", "creature voice", "effect")
    return label(row, sound=row["labels"]["class"]) if row["labels"]["class"] in common else None


def words(row: Row) -> Row | None:
    return label(row) if row["language"] in ("es", "en") else None


# data set -> how a row is told, and most clips of train and test
PARTS: dict[str, tuple[Any, int, int]] = {
    "fsdd": (digits, 150, 50),
    "emodb": (actors, 120, 50),
    "sound_events": (events, 120, 50),
    "librispeech_mini": (words, 20, 10),
    "tuxpaint_speech": (words, 60, 20),
}


def mixed_set(folder: Path) -> Path:
    """The set as a folder of manifests beside links to the recordings; the same every time."""
    for name, (tell, train, test) in PARTS.items():
        rows = [json.loads(line) for line in (DATA / name / "manifest.jsonl").read_text().splitlines()]
        told = [made for row in rows if (made := tell(row))]
        chosen = [
            row
            for split, most in (("train", train), ("test", test))
            for row in spread([r for r in told if r["split"] == split], most)
        ]
        part = folder / name
        part.mkdir(parents=True, exist_ok=True)
        if not (part / "audio").is_symlink():
            (part / "audio").symlink_to(DATA / name / "audio")
        (part / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def spread(rows: list[Row], most: int) -> list[Row]:
    """At most so many rows, evenly spaced over all."""
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def run(arch: str, data: Path, lake: Path, settings: Iterable[str]) -> tuple[Scores, Scores, dict[str, float]]:
    """Scores after and before training, and the seconds of each stage."""
    shutil.rmtree(lake / "runs" / arch, ignore_errors=True)
    words = ["run", "--arch", arch, "--data", str(data), "--lake", str(lake), "dataset=mix"]
    words += [f"eval_task={judged_by(arch)}", "baseline_clips=60", *settings]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arch} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    print(done.stdout[done.stdout.find("stage ") :], f"  {arch}: {time.monotonic() - began:.0f} s", flush=True)
    found = max((lake / "runs" / arch).glob("mix-*/evaluation/scores.json"), key=lambda path: path.stat().st_mtime)
    both = json.loads(found.read_text())
    manifests = sorted((lake / "runs" / arch / "stages").glob("*/manifest.json"))
    seconds = {path.parent.name: json.loads(path.read_text())["seconds"] for path in manifests}
    return Scores.model_validate(both["scores"]), Scores.model_validate(both["before"]), seconds


def judged_by(arch: str) -> str:
    return "asr" if arch in RECOGNISERS else "labels"


def over_all(scores: Scores) -> dict[str, float]:
    """Accuracy, share of right choices and the majority's accuracy over the clips of all tasks."""
    rates = [result.all for result in scores.tasks.values()]
    clips = sum(rate.n for rate in rates)
    return {
        "accuracy": sum(rate.exact * rate.n for rate in rates) / clips,
        "choice": sum((rate.choice or 0.0) * rate.n for rate in rates) / clips,
        "majority": sum(rate.majority * rate.n for rate in rates) / clips,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", help="default: all")
    parser.add_argument("--folder", type=Path, default=Path("side_by_side"), help="where set and lake go")
    parser.add_argument("--set", action="append", default=[], help="key=value, as the command line takes it")
    given = parser.parse_args()
    if not DATA.is_dir():
        print(f"no recordings at {DATA}", file=sys.stderr)
        return 2
    data, lake = mixed_set(given.folder / "mix"), given.folder / "lake"
    tasks: list[str] = []
    worse = 0
    kept: dict[str, list[str]] = {"labels": [], "asr": []}
    for arch in given.architectures or names():
        after, before, seconds = run(arch, data, lake, given.set)
        whole, was, spent = over_all(after), over_all(before), sum(seconds.values())
        better = whole["accuracy"] > max(was["accuracy"], whole["majority"]) and spent <= LIMIT
        worse += not better
        cells = [load(arch).title, *(f"{rate:.1%}" for rate in (whole["accuracy"], was["accuracy"], whole["majority"]))]
        if judged_by(arch) == "asr":
            cells += [f"{after.tasks['asr'].all.wer:.1%}", f"{before.tasks['asr'].all.wer:.1%}"]
        else:
            cells += [f"{whole['choice']:.1%}", *(f"{result.all.exact:.0%}" for result in after.tasks.values())]
            tasks = [task.partition(":")[2] for task in after.tasks]
        line = f"| {' | '.join([*cells, f'{spent:.0f} s'])} |"
        kept[judged_by(arch)].append(line)
        print(line, "" if better else "  <- not better, or too slow", flush=True)
    print(machine())
    heads = {"labels": ["likeliest label", *(tasks if kept["labels"] else [])], "asr": ["WER", "untrained WER"]}
    for judge, lines in kept.items():
        columns = ["system", "right", "untrained", "most frequent", *heads[judge], "training"]
        print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n" + "\n".join(lines))
    return int(worse > 0)


if __name__ == "__main__":
    raise SystemExit(main())
