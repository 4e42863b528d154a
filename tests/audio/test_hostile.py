"""Everything hostile in one data folder beside a few good clips: exactly these come through, the rest is named."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hostile_corpus import Corpus, build
from test_decode import BAD_FOLDER

from components.audio.sources import read_sources
from components.schema import AudioManifest, Reject
from components.shards.group import plan_groups, set_duplicates_aside
from components.shards.index import read_index
from components.shards.ingest import ingest_config, ingest_group
from components.shards.publish import dataset_version, publish
from infra import storage

REPOSITORY = Path(__file__).resolve().parents[2]
MORE_MEMORY = 64 << 20  # bytes above a clean run
MORE_WITH_BOMBS = 400 << 20  # a line of 50 MB is read whole with its manifest, a hundred thousand rejects are listed
MOST_OF_A_PROCESS = 1 << 30  # bytes; the command line itself has 660 MiB after a clean run of as many clips


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with files that nobody may read or change, and room for data and a lake."""
    for name in ("outside/secret.wav", "outside/folder/more.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(Corpus(tmp_path, tmp_path, False).tone())
    (tmp_path / "outside/secret.txt").write_text("u1 the key of the house\n")
    return tmp_path


def snapshot(folder: Path, lake: Path) -> dict[str, tuple[object, ...]]:
    """Size, time and sha256 of everything in a folder but the lake; links as such."""
    seen: dict[str, tuple[object, ...]] = {}
    for base, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(base, name) != lake]
        for name in (*folders, *files):
            path = Path(base, name)
            status = path.lstat()
            small = path.is_file() and not path.is_symlink() and status.st_size < 1 << 24
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
            seen[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, digest)
    return seen


def ingest(data: Path, root: str) -> AudioManifest:
    """Every step of the stage, in this process."""
    recordings, rejects = read_sources(str(data))
    kept, doubled = set_duplicates_aside(recordings, str(data))
    groups = plan_groups(kept, 32)
    for number, group in enumerate(groups):
        ingest_group(number, group, root, str(data))
    aside = [*rejects, *doubled]
    version = dataset_version(recordings, rejects, ingest_config(32), str(data))
    return publish(root, "hostile", version, groups, aside, str(data), 32)


def expected(corpus: Corpus, bad_folder: bool) -> tuple[Counter[str], list[tuple[str, str]]]:
    kept, rejects = Counter(corpus.kept), list(corpus.rejects)
    for name, becomes in BAD_FOLDER.items() if bad_folder else ():
        if isinstance(becomes, str):
            rejects.append((f"bad/{name}", becomes))
        else:
            kept[f"bad/{name}"] += 1
    return kept, rejects


def check(root: str, corpus: Corpus, bad_folder: bool) -> list[Reject]:
    """The index holds exactly the good clips, and each hostile thing is a reject with its sentence."""
    kept, wanted = expected(corpus, bad_folder)
    assert Counter(read_index(root).column("original").to_pylist()) == kept
    lines = storage.read_bytes(f"{root}/rejects.jsonl").splitlines()
    rejects = [Reject.model_validate_json(line) for line in lines]
    found: dict[str, list[str]] = {}
    for reject in rejects:
        check_sentence(reject)
        found.setdefault(reject.original, []).append(reject.reason)
    swallowed = [found.pop(name) for name in list(found) if name.startswith("csv/manifest.csv")]
    assert 5 <= len(swallowed) <= 200 and all("quotes" in reason for (reason,) in swallowed)
    names = {name for name, _ in wanted}
    assert (set(found) - names, names - set(found)) == (set(), set())
    for name, phrase in wanted:
        assert any(phrase in reason for reason in found[name]), (name, phrase, found[name])
    assert sum(map(len, found.values())) == len(wanted)
    return rejects


def check_sentence(reject: Reject) -> None:
    """What is wrong and what to do: never the words of an exception that nobody foresaw."""
    reason = reject.reason
    assert reject.id and len(reason) < 450 and "\n" not in reason
    assert re.search(r"[;:]| must ", reason), reason
    assert not re.search(r"\b\w+(Error|Exception)\b|Traceback|cannot be decoded \(", reason), reason


def peak() -> int:
    """Bytes of memory at most since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", text)[0]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def grown(data: Path, root: Path) -> tuple[int, float]:
    """By how many bytes an ingest raises the memory, and the seconds of CPU that it takes."""
    before, began = forget_peak(), time.process_time()
    ingest(data, str(root))
    return peak() - before, time.process_time() - began


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # soundfile, told to seek to 2^64
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are told by Linux alone")
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_the_good_clips_come_through(place: Path, large: bool, request: pytest.FixtureRequest) -> None:
    shared = REPOSITORY.parent / "shared/data/bad"
    bad_folder = shared if shared.is_dir() else None
    corpus = build(place / "data", place / "outside", bad_folder, large)
    clean = Corpus(place / "clean", place / "outside", False)
    for number in range(sum(corpus.kept.values())):
        clean.good(f"{number}.wav")
    usual, _ = grown(place / "clean", place / "lake/clean")
    before = snapshot(place, place / "lake")
    more, seconds = grown(place / "data", place / "lake/hostile")
    check(str(place / "lake/hostile"), corpus, bad_folder is not None)
    assert snapshot(place, place / "lake") == before
    assert sorted(os.listdir(place)) == ["clean", "data", "lake", "outside"]
    print(f"memory {usual >> 20} MiB clean, {more >> 20} MiB hostile; {seconds:.1f} s")
    assert more - usual < (MORE_WITH_BOMBS if large else MORE_MEMORY)
    assert seconds < (60 if large else 10)


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Most bytes of memory of the process and of its children until it ends, by their first words."""
    most: dict[str, int] = {}
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 300:
        with suppress(psutil.Error):
            for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
                with suppress(psutil.Error):
                    words = " ".join(one.cmdline())[:80]
                    most[words] = max(most.get(words, 0), one.memory_info().rss)
        time.sleep(0.05)
    return most


@pytest.mark.slow
def test_the_command_line_survives_it_all(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The stage as a person starts it, Prefect and Ray included; the working folder is one that nobody may change."""
    shared = REPOSITORY.parent / "shared/data/bad"
    corpus = build(place / "data", place / "outside", shared if shared.is_dir() else None, large=False)
    home = tmp_path_factory.mktemp("home")
    own = {"HOME": str(home), "EARLOOM_HOME": str(home / "earloom"), "PREFECT_HOME": str(home / "prefect")}
    before = snapshot(place, place / "lake")
    words = ["ingest", "--arch", "funasr_llm", "--data", str(place / "data"), "--lake", str(place / "lake"), "cpus=1"]
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *words],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"} | own,
            cwd=place / "outside",
            stdout=log,
            stderr=log,
        )
        most = watch(process)
    said = (home / "log").read_text()
    assert process.returncode == 0, said[-3000:]
    (root,) = (place / "lake/audio/data").glob("[0-9a-f]*")
    rejects = check(str(root), corpus, shared.is_dir())
    assert snapshot(place, place / "lake") == before
    assert sorted(os.listdir(place)) == ["data", "lake", "outside"]
    assert f"{len(rejects)} set aside" in said and "Traceback" not in said
    page = (root / "card.html").read_text()
    assert "<img src=x" not in page and "<script>alert" not in page
    print({words: used >> 20 for words, used in most.items()})
    assert max(most.values()) < MOST_OF_A_PROCESS
