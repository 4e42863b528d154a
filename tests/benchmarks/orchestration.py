"""What Prefect and Ray cost: the demo as a person runs it, against its components called directly.

`python -m tests.benchmarks.orchestration`. Both sides do the same work on the same corpus, in fresh processes with a
fresh lake, from the shell's prompt to the next: imports, start-up, summary and shut-down are part of it. They take
turns. The bar: at most 10 % more, or 15 s.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from tests.benchmarks.measuring import STEADY, environment, interleaved, machine, middle

REPOSITORY = Path(__file__).parents[2]
SHARE, SECONDS = 0.10, 15.0
ARCH = "funasr_llm"


def settings_of(corpus: Path, lake: Path) -> list[str]:
    from pipelines.cli import DEMO_SETTINGS

    words = ["--arch", ARCH, "--data", str(corpus), "--lake", str(lake)]
    return [*words, *DEMO_SETTINGS[ARCH], "baseline_clips=32", "dataset=demo"]


def run_directly(words: list[str]) -> None:
    """A side in this process: `words` are those of `earloom run`."""
    from infra.environment import prepare

    prepare()
    from pipelines.overrides import parse_words, run_config
    from pipelines.summary import show_stages
    from tests.direct import run_directly as run

    given = dict(zip(("arch", "data", "lake"), words[1:6:2], strict=True))
    show_stages(run(run_config(given | parse_words(words[6:]))))


def seconds_of(module: str, command: str, corpus: Path) -> float:
    with tempfile.TemporaryDirectory(prefix="orchestration.") as folder:
        words = [sys.executable, "-m", module, command, *settings_of(corpus, Path(folder) / "lake")]
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, env=environment(str(REPOSITORY)), cwd=folder)
        spent = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-3000:])
        return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    from components.corpus.speak import speak_corpus

    with tempfile.TemporaryDirectory(prefix="orchestration.") as folder:
        corpus = speak_corpus(Path(folder) / "corpus", given.clips).parent
        ways = {
            "directly": partial(seconds_of, "tests.benchmarks.orchestration", "directly", corpus),
            "as flows": partial(seconds_of, "pipelines.cli", "run", corpus),
        }
        print(f"{machine()}; the demo with {given.clips} clips", flush=True)
        found = interleaved(ways, given.rounds)
    for name, taken in found.items():
        print(f"{name}: {middle(taken)} s")
    base, flows = found["directly"], found["as flows"]
    more = median(b - a for a, b in zip(base, flows, strict=True))
    share = more / median(base)
    steady = max(base) / min(base) <= STEADY
    met = more <= SECONDS or share <= SHARE
    said = ("met" if met else "MISSED") if steady else "NOT MEASURED: the base is not steady; run it again"
    print(f"Prefect and Ray: {more:+.1f} s, {share:+.0%}; bar at most {SHARE:.0%} or {SECONDS:.0f} s: {said}")
    return int(not (met and steady))


if __name__ == "__main__":
    if sys.argv[1:2] == ["directly"]:
        run_directly(sys.argv[2:])
    else:
        raise SystemExit(main())
