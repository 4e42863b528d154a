"""A Ray cluster of two nodes, one of which is killed in the middle of ingest and of cache; and who gets which GPU."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from infra import cluster as infra_cluster
from pipelines import crew
from pipelines.config import RunConfig
from tests.direct import in_this_process, without_ray
from tests.pipelines.conftest import hashes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CLIPS, SECONDS, RATE = 100, 20.0, 44_100  # so many that both nodes have work, however slowly one starts
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 128 << 20}  # a GPU in Ray's books only


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Two nodes, each a raylet of its own with one core."""
    from ray.cluster_utils import Cluster

    infra_cluster.disconnect()
    made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        made.add_node(**NODE)
        made.wait_for_nodes()
        yield made
    finally:
        infra_cluster.disconnect()
        made.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of noise in the wrong rate, so that each costs some time."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for number in range(CLIPS):
        level = np.abs(np.sin(np.arange(int(SECONDS * RATE)) / (9_000 + 100 * number)))
        wave = 0.2 * level * random.standard_normal(len(level))
        soundfile.write(folder / f"{number:02d}.wav", wave.clip(-1, 1), RATE)
        (folder / f"{number:02d}.txt").write_text(f"noise number {number}")
    return folder


def config(nodes: Any, data: Path, lake: Path, arch: str = "funasr_llm", **more: Any) -> RunConfig:
    settings: dict[str, Any] = {"preset": "tiny", "per_shard": 2, "ray_address": nodes.address} | more
    return RunConfig(arch=arch, data=str(data), lake=str(lake), **settings)


def at_work(node: Any) -> bool:
    """Whether a worker process of the node is in the middle of an item; Ray names processes after what they do."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("_Hand.work" in name for name in process_names(raylet))


def process_names(parent: psutil.Process) -> Iterator[str]:
    for child in parent.children():
        try:
            yield " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue


@contextmanager
def second_node_killed(nodes: Any, done: Callable[[], int]) -> Iterator[list[int]]:
    """SIGKILL to the second node as soon as two shards are done and it works on another; a new node afterwards."""
    (node,) = nodes.worker_nodes
    at: list[int] = []

    def watch() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if done() >= 2 and at_work(node):
                nodes.remove_node(node, allow_graceful=False)
                at.append(done())
                return
            time.sleep(0.005)

    watcher = Thread(target=watch)
    watcher.start()
    yield at
    watcher.join()
    nodes.add_node(**NODE)


def parts(lake: Path, kind: str) -> int:
    return len(list(lake.glob(f"{kind}/**/parts/*.json")))


def test_a_node_killed_in_ingest_and_in_cache_costs_time_only(
    nodes: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cache import cache_features
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    lake, clean = tmp_path / "lake", tmp_path / "clean"
    for stage, kind, task in (("ingest", "audio", ingest_audio), ("cache", "features", cache_features)):
        with second_node_killed(nodes, lambda kind=kind: parts(lake, kind)) as at:  # type: ignore[misc]
            report = task.fn(Workspace(config(nodes, data, lake)))
        assert report.stage == stage
        assert report.done + report.reused == CLIPS // 2
        assert report.reused <= 1  # a shard that was done, but not yet reported, when its node went
        assert 2 <= at[0] < CLIPS // 2 - 1
    infra_cluster.disconnect()

    with without_ray(in_this_process):
        for task in (ingest_audio, cache_features):
            task.fn(Workspace(config(nodes, data, clean)))
    for pattern, count in (
        ("audio/*/*/shard-*.tar", CLIPS // 2),
        ("audio/*/*/samples.parquet", 1),
        ("audio/*/*/rejects.jsonl", 1),
        ("features/*/*/*/shard-*.tar", CLIPS // 2),
        ("features/*/*/*/features.parquet", 1),
        ("features/*/*/*/manifest.json", 1),
    ):
        assert hashes(lake, pattern) == hashes(clean, pattern)
        assert len(hashes(lake, pattern)) == count


def test_one_actor_a_gpu_and_else_one_a_core(nodes: Any, data: Path, tmp_path: Path) -> None:
    import ray

    def placed() -> Callable[[int], tuple[str, dict[str, float]]]:
        def work(_: int) -> tuple[str, dict[str, float]]:
            import ray

            time.sleep(0.2)  # so that one actor does not do it all
            context = ray.get_runtime_context()
            return context.get_node_id(), context.get_assigned_resources()

        return work

    settings = config(nodes, data, tmp_path)
    infra_cluster.connect(nodes.address, 1)
    until = time.monotonic() + 60
    while ray.cluster_resources()["CPU"] != 2 and time.monotonic() < until:  # a killed node is missed after seconds
        time.sleep(0.2)
    for gpus, share in ((True, {"CPU": 1.0, "GPU": 1.0}), (False, {"CPU": 1.0})):
        with crew.Crew(settings, placed, (), 60, gpus) as hands:
            found = [result for _, result in hands.over(range(60))]
            assert hands.size == 2
        assert {node for node, _ in found} == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        assert all(got == share for _, got in found)


def test_a_worker_without_the_card_of_the_key_refuses(data: Path, tmp_path: Path) -> None:
    from components.features.key import feature_key
    from pipelines.locate import Workspace
    from pipelines.workers.cache import extractor

    work = Workspace(RunConfig(arch="funasr_llm", data=str(data), lake=str(tmp_path), preset="tiny"))
    keys = {role: feature_key(encoder) for role, encoder in work.encoders.items()}
    for key in keys.values():
        key["numerics"] |= {"device": "cuda", "capability": "sm_00 a card that nobody has"}
    with pytest.raises(ValueError, match=r"would compute other features.*a card that nobody has"):
        extractor(work.preset.model_dump(mode="json"), "", dict.fromkeys(keys, "a/b/c"), keys, None)


def test_what_a_set_up_raises_is_raised_and_only_a_process_that_dies_is_crashed(
    nodes: Any, data: Path, tmp_path: Path
) -> None:
    def refusing() -> Callable[[int], int]:
        raise ValueError("another machine than the key's")

    def dying() -> Callable[[int], int]:
        return lambda item: os._exit(1) if item == 3 else item

    settings = config(nodes, data, tmp_path)
    with pytest.raises(ValueError, match="another machine"):
        list(crew.over_shards(settings, refusing, (), [1, 2]))
    found = dict(crew.over_shards(settings, dying, (), list(range(5))))
    assert found.pop(3).reason == "took its process down"
    assert found == {0: 0, 1: 1, 2: 2, 4: 4}


def test_the_codebook_has_the_same_bytes_with_one_two_and_three_workers(
    nodes: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.cache import cache_features, fit_codebook
    from pipelines.ingest import ingest_audio
    from pipelines.locate import Workspace

    infra_cluster.disconnect()
    lake = tmp_path / "lake"
    with without_ray(in_this_process):
        for task in (ingest_audio, cache_features):
            task.fn(Workspace(config(nodes, data, lake, "speechgpt")))
    found = []
    for workers in (1, 2, 3):
        infra_cluster.disconnect()
        shutil.rmtree(lake / "units", ignore_errors=True)
        more = {"cpus": workers} if workers < 3 else {"ray_address": None, "cpus": 3}
        work = Workspace(config(nodes, data, lake, "speechgpt", **more))
        assert fit_codebook.fn(work).done == 1
        assert fit_codebook.fn(Workspace(work.config)).state == "up to date"
        found.append(hashes(lake, "units/*/*"))
    infra_cluster.disconnect()
    assert len(found[0]) == 2 and found == found[:1] * 3
