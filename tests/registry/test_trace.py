"""What was made from a speaker, file or clip, what a model was made from, and what has no origin."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.compute as pc
import pytest

from components.registry.graph import read_graph
from components.registry.records import INPUTS, Record, read_part
from components.registry.search import Subject
from components.registry.trace import Trace, backward, forward
from components.schema import Reject, ShardInfo
from components.seal import sealed
from components.shards.index import INDEX, MANIFEST, SampleRow
from components.shards.parts import Part
from infra import storage
from tests.registry.lake_helpers import (
    add_audio,
    add_cache,
    add_codebook,
    add_projection,
    add_run,
    add_stages,
    copied,
    index_table,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version one (16 clips) with features, units, two stages and a run; version two (8 clips) with a cache alone."""
    folder = tmp_path_factory.mktemp("made")
    root = str(folder)
    one = add_audio(root, "talk", "v1", index_table(16))
    features = add_cache(root, one, "f" * 16)
    add_codebook(root, "b" * 16, features)
    add_projection(root, "9" * 16, one)
    units = add_cache(root, one, "a" * 16, codebook="b" * 16)
    stages = add_stages(root, ["1-adapt-aa", "2-lora-bb"], one, [units])
    add_run(root, "talk-r1", one, [units], stages)
    add_cache(root, add_audio(root, "talk", "v2", index_table(8, speakers=2)), "f" * 16)
    return folder


@pytest.fixture(params=["local", "memory"])
def lake(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> str:
    """A copy of it to work on."""
    return copied(made, request.param, tmp_path)


def follow(lake: str, kind: str, name: str, every: bool = False) -> Trace:
    return forward(read_graph(lake), Subject(kind, name), every)  # type: ignore[arg-type]


def back(lake: str, run: str = "talk-r1", every: bool = False) -> Trace:
    url = storage.join(lake, "runs/salmonn", run, "model")
    record = read_part(storage.join(url, "lineage.json"), Record)
    assert isinstance(record, Record)
    return backward(read_graph(lake), "talker/1", url, record, every)


def test_a_speaker_is_followed_to_the_registered_version(lake: str) -> None:
    found = follow(lake, "speaker", "s2")  # clips 2, 5, 8, 11, 14 of version one; 11 is in test
    (part,) = found.audio
    assert (part.version, part.clips, part.seconds, part.files) == ("v1", 5, 5.0, 5)
    assert part.splits == {"test": 1, "train": 4}
    assert part.shards == tuple(f"shard-{i:06d}.tar" for i in range(4))
    assert [cache.place for cache in found.caches] == [f"{'a' * 16}/talk/v1", f"{'f' * 16}/talk/v1"]
    assert (found.codebooks, found.projections) == (("b" * 16,), ("9" * 16,))
    assert [(stage.name, stage.clips) for stage in found.stages] == [("1-adapt-aa", 4), ("2-lora-bb", 4)]
    assert [(run.name, run.clips) for run in found.runs] == [("talk-r1", 4)]
    assert [(model.name, model.version, model.clips) for model in found.models] == [("talker", "1", 4)]
    assert found.gaps == ()


def test_a_speaker_of_both_versions_and_one_of_none(lake: str) -> None:
    found = follow(lake, "speaker", "s1")
    assert [(part.version, part.clips) for part in found.audio] == [("v1", 5), ("v2", 4)]
    assert len(found.caches) == 3
    nobody = follow(lake, "speaker", "s9")
    assert (nobody.audio, nobody.caches, nobody.stages, nobody.models, nobody.gaps) == ((), (), (), (), ())


@pytest.mark.parametrize("name", ["spk/f3.wav", "f3.wav", "/data/talk/spk/f3.wav"])
def test_a_file_by_any_of_its_names(lake: str, name: str) -> None:
    found = follow(lake, "file", name)
    assert [(part.version, part.clips, part.splits) for part in found.audio] == [
        ("v1", 1, {"test": 1}),
        ("v2", 1, {"test": 1}),
    ]
    assert found.audio[0].first_files[0].digests == (f"{3:063x}d",)
    assert [stage.clips for stage in found.stages] == [0, 0]  # a test clip: judged by it, not trained on it
    assert [model.clips for model in found.models] == [0]


def test_a_clip_by_its_id_or_key(lake: str) -> None:
    assert follow(lake, "clip", "clip-12").audio == follow(lake, "clip", "0000012").audio
    assert follow(lake, "clip", "clip-12").models[0].clips == 1
    assert follow(lake, "clip", "f12.wav").audio == ()


def test_a_data_set_has_all_its_versions(lake: str) -> None:
    found = follow(lake, "dataset", "talk")
    assert [(part.version, part.clips, part.files) for part in found.audio] == [("v1", 16, 16), ("v2", 8, 8)]
    assert [len(part.first_files) for part in found.audio] == [5, 5]
    assert [len(part.first_files) for part in follow(lake, "dataset", "talk", every=True).audio] == [16, 8]
    assert found.audio[0].sources == ("/data/talk", "a book")
    assert follow(lake, "dataset", "tal").audio == ()


def test_a_model_is_followed_back_to_its_files(lake: str) -> None:
    found = back(lake, every=True)
    (part,) = found.audio
    assert (part.version, part.clips, part.licences) == ("v1", 16, {"CC0-1.0": 16})
    assert [file.name for file in part.first_files] == [f"spk/f{i}.wav" for i in range(16)]
    assert [stage.name for stage in found.stages] == ["1-adapt-aa", "2-lora-bb"]
    assert [cache.place[0] for cache in found.caches] == ["a", "f"]  # units, and the features under their codebook
    assert found.caches[0].encoder == "whisper, pooled by 4"
    assert found.weights == {"earloom/lm": "e" * 64}
    assert found.gaps == ()


def test_a_removed_cache_is_known_by_the_records(lake: str) -> None:
    storage.remove_tree(storage.join(lake, "features", "a" * 16))
    assert [(cache.place[0], cache.state) for cache in back(lake).caches] == [("a", "removed"), ("f", "finished")]
    assert back(lake).gaps == ()


def test_what_has_no_origin_is_a_gap(lake: str) -> None:
    storage.remove_tree(storage.join(lake, "audio/talk/v2"))
    (gap,) = read_graph(lake).gaps
    assert gap.url.endswith(f"features/{'f' * 16}/talk/v2")
    assert "audio talk/v2 (digest" in gap.lacks
    assert back(lake).gaps == ()  # not on the way of this model
    storage.remove_tree(storage.join(lake, "runs/salmonn/stages/1-adapt-aa"))
    assert [gap.lacks[:22] for gap in back(lake).gaps] == ["stage 1-adapt-aa is no"] * 2  # the run, and stage two
    storage.remove_tree(storage.join(lake, "audio/talk/v1"))
    assert {gap.lacks[:13] for gap in back(lake).gaps} == {"stage 1-adapt", "audio talk/v1"}
    assert len(read_graph(lake).gaps) == 8  # three caches, the projection, stage two (twice), the run (twice)


def test_a_stage_without_a_record_takes_that_of_its_run(lake: str) -> None:
    for name in ("1-adapt-aa", "2-lora-bb"):
        storage.remove_tree(storage.join(lake, "runs/salmonn/stages", name, INPUTS))
    graph = read_graph(lake)
    assert graph.gaps == []
    assert [len(stage.record.stages) for stage in graph.stages.values() if stage.record] == [0, 1]
    storage.remove_tree(storage.join(lake, "runs/salmonn/talk-r1"))
    assert ["no record" in gap.lacks for gap in read_graph(lake).gaps] == [True, True]


def test_damage_is_a_gap_and_the_rest_is_answered(lake: str) -> None:
    storage.write_bytes(storage.join(lake, "audio/talk/v2", INDEX), b"no parquet")
    storage.write_bytes(storage.join(lake, "runs/salmonn/stages/2-lora-bb", INPUTS), b"[1]")
    storage.write_bytes(storage.join(lake, "features", "c" * 16, "talk/v1", MANIFEST), b"{")
    found = follow(lake, "speaker", "s2")
    assert [part.version for part in found.audio] == ["v1"]
    assert len(found.models) == 1
    assert [gap.lacks.split(":")[0] for gap in found.gaps[:2]] == ["cannot be read", "cannot be read"]
    assert "cannot be searched" in found.gaps[-1].lacks
    flipped = storage.read_bytes(storage.join(lake, "audio/talk/v1", MANIFEST)).replace(
        b'"samples": 16', b'"samples": 17'
    )
    storage.write_bytes(storage.join(lake, "audio/talk/v1", MANIFEST), flipped)
    assert any("seal" in gap.lacks for gap in read_graph(lake).gaps)
    assert any("seal" in gap.lacks for gap in back(lake).gaps)


def test_clips_that_the_index_lacks_are_found_in_the_parts(tmp_path: Path) -> None:
    """Dropped as duplicates after packing: they lie in the shards. And an ingest that was killed."""
    lake, table = str(tmp_path), index_table(4)
    manifest = add_audio(lake, "talk", "v1", table.filter(pc.not_equal(table["id"], "clip-2")))
    more = manifest.shards[0].model_copy(update={"samples": 4})
    aside = Reject(original="spk/f2.wav", id="clip-2", reason="sounds like clip-0", step="duplicate")
    storage.write_text(f"{lake}/audio/talk/v1/rejects.jsonl", aside.model_dump_json() + "\n")
    changed = manifest.model_copy(update={"shards": (more,), "rejected": 1})
    storage.write_bytes(f"{lake}/audio/talk/v1/{MANIFEST}", sealed(changed))
    rows = tuple(SampleRow.model_validate(row) for row in table.to_pylist())
    shard = ShardInfo(name="shard-000000.tar", sha256="d" * 64, bytes=1, samples=4, seconds=4.0)
    part = Part(inputs="", shard=shard, rows=rows, rejects=(), sources={}, licences={})
    for version in ("v1", "v2"):
        storage.write_bytes(f"{lake}/audio/talk/{version}/parts/shard-000000.json", sealed(part))
    found = follow(lake, "file", "f2.wav")
    told = [(one.version, one.finished, one.clips, one.dropped) for one in found.audio]
    assert told == [("v1", True, 0, 1), ("v2", False, 1, 0)]
    assert found.audio[0].shards == ("shard-000000.tar",)
    assert found.notes == ("spk/f2.wav was set aside in talk/v1: sounds like clip-0",)
    assert follow(lake, "speaker", "s0").audio[0].dropped == 0


@pytest.mark.slow
def test_two_hundred_thousand_clips_in_a_second(tmp_path: Path) -> None:
    lake = str(tmp_path)
    audio = add_audio(lake, "talk", "v1", index_table(200_000, per_shard=256, speakers=1000))
    add_run(lake, "r", audio, [], add_stages(lake, ["1-a"], audio, []))
    taken = 9.0
    for _ in range(3):  # the machine may be busy
        began = time.perf_counter()
        found = follow(lake, "speaker", "s77")
        taken = min(taken, time.perf_counter() - began)
        if taken < 1.5:
            break
    assert (found.audio[0].clips, found.audio[0].splits, found.models[0].clips) == (200, {"train": 200}, 200)
    assert taken < 1.5
