"""Ingest and cache on an S3 server that fails, with processes that are killed and drivers that race: the same bytes.

Every run but the fault-free one has the faults of `RATES` between itself and the server.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from pipelines.config import RunConfig
from tests.direct import in_this_process, without_ray
from tests.infra.fault_proxy import Remote, proxied
from tests.pipelines.conftest import earloom, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RATES = {"errors": 0.10, "resets": 0.02, "truncated": 0.01}
LATENCY = 0.03  # seconds of each request where something is killed, as an object store has them
MEETING = 0.3  # seconds of each request where two are to be at it at the same time, though one began sooner
CLIPS, JOINED, PER_SHARD = 72, 40, 12
SHARDS = CLIPS // PER_SHARD
TURNS = 3
LIMIT = 1.35  # times as long with faults as without


@pytest.fixture(scope="module")
def recordings(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of more than a minute, spoken sentences one after the other, so that a shard is some work."""
    folder = tmp_path_factory.mktemp("recordings")
    spoken = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    audio = [soundfile.read(corpus / row["audio"], dtype="int16")[0] for row in spoken]
    rows = []
    for number in range(CLIPS):
        chosen = [(number * 7 + place * (1 + number // len(spoken))) % len(spoken) for place in range(JOINED)]
        soundfile.write(folder / f"{number:03d}.wav", np.concatenate([audio[i] for i in chosen]), 16_000)
        rows.append({"audio": f"{number:03d}.wav", "text": " ".join(spoken[i]["text"] for i in chosen)})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def proxy(bucket: str) -> Iterator[Remote]:
    with proxied() as between:
        yield between


@pytest.fixture(scope="module")
def ray_here(proxy: Remote) -> Iterator[None]:
    """A Ray of our own, whose processes know the proxy."""
    from infra import cluster

    cluster.disconnect()
    cluster.connect(None, 2)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def straight(recordings: Path, bucket: str, proxy: Remote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a fault-free run leaves."""
    with pytest.MonkeyPatch.context() as patched:
        took(recordings, f"{bucket}/straight", tmp_path_factory.mktemp("home"), patched)
    return contents(f"{bucket}/straight")


def config(recordings: Path, lake: str) -> RunConfig:
    return RunConfig(
        arch="funasr_llm", preset="tiny", data=str(recordings), lake=lake, dataset="spoken", per_shard=PER_SHARD, cpus=2
    )


def words(recordings: Path, lake: str) -> tuple[str, ...]:
    """The same settings as a person writes them."""
    named = ("--arch", "funasr_llm", "--data", str(recordings), "--lake", lake)
    return (*named, "preset=tiny", "dataset=spoken", f"per_shard={PER_SHARD}")


def contents(lake: str, below: str = "") -> dict[str, str]:
    """sha256 of every object of a lake, by its path in it."""
    import boto3

    client, prefix = boto3.client("s3"), lake.removeprefix("s3://lake/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="lake", Prefix=prefix + below)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    bodies = {key: client.get_object(Bucket="lake", Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(prefix): hashlib.sha256(body).hexdigest() for key, body in bodies.items()}


def only_audio(objects: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in objects.items() if name.startswith("audio/")}


def took(recordings: Path, lake: str, home: Path, patched: pytest.MonkeyPatch) -> tuple[float, float]:
    """Seconds of ingest and of cache, without what is not their work: to find the files, to start processes."""
    from pipelines.cache import cache_features
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    patched.setenv("EARLOOM_HOME", str(home))  # no shard is at hand from the run before
    work = Workspace(config(recordings, lake))
    assert len(work.sources[0]) == CLIPS
    assert list(work.encoders) == ["speech"]
    with without_ray(in_this_process):  # of two threads at once the last bits are not always the same
        began = time.perf_counter()
        assert ingest_audio.fn(work).done == SHARDS
        between = time.perf_counter()
        assert cache_features.fn(work).done == SHARDS
        return between - began, time.perf_counter() - between


def records(written: list[str], lake: str) -> list[str]:
    """Records of finished shards, as they were written."""
    return [name for name in written if name.startswith(lake.removeprefix("s3://")) and "/parts/shard-" in name]


def hands(driver: int, doing: str = "ray::_Hand") -> list[psutil.Process]:
    """Actors of a driver; Ray names processes after what they do."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if doing in " ".join(process.cmdline()) else []
    return found


def manifests_came_last(written: list[str]) -> int:
    """How many manifests there are; none was written before all that it speaks of."""
    manifests = [name for name in dict.fromkeys(written) if name.endswith("/manifest.json")]
    for manifest in manifests:
        root, at = manifest.removesuffix("manifest.json"), written.index(manifest)
        below = {name.removeprefix(root) for name in written[:at] if name.startswith(root)}
        later = {name.removeprefix(root) for name in written[at + 1 :] if name.startswith(root)}
        assert later - {"manifest.json"} <= {"card.html"}
        assert len([name for name in below if name.startswith("shard-")]) == SHARDS
        assert below & {"samples.parquet", "features.parquet"}
    return len(manifests)


def test_faults_change_no_byte_and_cost_little_time(
    recordings: Path, bucket: str, proxy: Remote, straight: dict[str, str], tmp_path: Path
) -> None:
    """The time is that of the work alone: actors take as long to start with faults as without, and would hide them."""
    seconds: dict[str, list[tuple[float, float]]] = {"clean": [], "faulty": []}
    met: dict[str, int] = {}
    for turn in range(TURNS):
        for kind, faults in (("clean", {}), ("faulty", RATES)):
            lake, home = f"{bucket}/{kind}-{turn}", tmp_path / f"{kind}-{turn}"
            proxy.change(seed=turn, **faults)
            with pytest.MonkeyPatch.context() as patched:
                seconds[kind].append(took(recordings, lake, home, patched))
            if faults:
                met = {name: met.get(name, 0) + count for name, count in proxy.counts().items()}
            assert manifests_came_last(proxy.written()) == 2
            proxy.change()
            assert contents(lake) == straight
    assert min(met[name] for name in ("slow_down", "internal_errors", "resets", "replies_lost", "truncated")) >= 1, met
    print(f"\nfaults met: {met}")
    for name, place in (("ingest", 0), ("cache", 1)):
        clean, faulty = (statistics.median(one[place] for one in seconds[kind]) for kind in ("clean", "faulty"))
        print(f"{name}: {clean:.2f} s without faults, {faulty:.2f} s with them, {faulty / clean:.2f} times")
    clean, faulty = (statistics.median(map(sum, seconds[kind])) for kind in ("clean", "faulty"))
    print(f"both: {clean:.2f} s and {faulty:.2f} s, {faulty / clean:.2f} times; all runs {seconds}")
    assert faulty <= LIMIT * clean


def test_a_killed_worker_costs_no_shard(
    recordings: Path, bucket: str, proxy: Remote, ray_here: None, straight: dict[str, str]
) -> None:
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    lake, killed = f"{bucket}/worker", list[int]()
    proxy.change(seed=10, delay=LATENCY, **RATES)

    def kill() -> None:
        """SIGKILL to an actor that is at work on a shard, when two shards are there."""
        while len(records(proxy.written(), lake)) < 2:
            time.sleep(0.01)
        for process in hands(os.getpid(), "ray::_Hand.work")[:1]:
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = ingest_audio.fn(Workspace(config(recordings, lake)))
    killer.join(10)
    assert len(killed) == 1
    assert (report.done + report.reused, manifests_came_last(proxy.written())) == (SHARDS, 1)
    proxy.change()
    assert contents(lake) == only_audio(straight)


def test_after_a_killed_driver_the_next_goes_on(
    recordings: Path,
    bucket: str,
    proxy: Remote,
    ray_here: None,
    straight: dict[str, str],
    prefect_url: str,
    tmp_path: Path,
) -> None:
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    lake = f"{bucket}/driver"
    proxy.change(seed=20, delay=LATENCY, **RATES)
    process = earloom("ingest", *words(recordings, lake), lake=tmp_path / "none", server=prefect_url)
    wait_for(process, lambda: len(records(proxy.written(), lake)) >= 2)
    workers = hands(process.pid)
    process.kill()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # they end with their driver

    proxy.change()
    seen = contents(lake)
    assert not any(name.endswith(("manifest.json", "samples.parquet")) for name in seen)
    whole = only_audio(straight)
    assert {name: whole.get(name) for name in seen} == seen  # what is visible is what it will be
    finished = [name for name in seen if "/parts/" in name]
    assert 2 <= len(finished) < SHARDS
    assert {name.replace("/parts/", "/").replace(".json", ".tar") for name in finished} <= set(seen)

    proxy.change(seed=21, **RATES)
    report = ingest_audio.fn(Workspace(config(recordings, lake)))
    assert (report.state, report.reused, report.done) == ("resumed", len(finished), SHARDS - len(finished))
    assert manifests_came_last([*(f"lake/driver/{name}" for name in seen), *proxy.written()]) == 1
    proxy.change()
    assert contents(lake) == whole


def test_two_drivers_at_once_end_well_and_alike(
    recordings: Path,
    bucket: str,
    proxy: Remote,
    straight: dict[str, str],
    prefect_url: str,
    tmp_path: Path,
) -> None:
    """Two command lines that ingest, and then two that cache."""
    lake = f"{bucket}/race"
    settings = (*words(recordings, lake), "cpus=1")
    for stage, seed in (("ingest", 30), ("cache", 31)):
        proxy.change(seed=seed, delay=MEETING, **RATES)
        drivers = [earloom(stage, *settings, lake=tmp_path / "none", server=prefect_url) for _ in range(2)]
        for driver in drivers:
            output, _ = driver.communicate(timeout=300)
            assert driver.returncode == 0, output
        assert len([name for name in proxy.written() if name.endswith(".tar")]) > SHARDS  # they did meet
    proxy.change()
    assert contents(lake) == straight
