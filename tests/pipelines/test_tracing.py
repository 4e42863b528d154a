"""The commands trace and caches: what they print, what they refuse, and with what they end."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from components.registry.graph import read_graph
from components.registry.records import INPUTS, LINEAGE
from infra import storage
from pipelines.caches import caches_of, quantity, users
from pipelines.cli import app
from pipelines.tracing import model_folder
from tests.registry.lake_helpers import add_audio, add_cache, add_codebook, add_run, add_stages, index_table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen clips, units, features under them and features that nobody uses, two stages, a run; all 40 days old."""
    root = str(tmp_path_factory.mktemp("made") / "lake")
    audio = add_audio(root, "talk", "v1", index_table(16))
    features = add_cache(root, audio, "f" * 16)
    add_codebook(root, "b" * 16, features)
    units = add_cache(root, audio, "a" * 16, codebook="b" * 16)
    add_cache(root, audio, "e" * 16)
    stages = add_stages(root, ["1-adapt-aa", "2-lora-bb"], audio, [units])
    add_run(root, "talk-r1", audio, [units], stages)
    for path in Path(root, "features").rglob("*"):
        os.utime(path, (time.time() - 40 * 86_400,) * 2)
    return root


@pytest.fixture
def lake(made: str, tmp_path: Path) -> str:
    """A copy of it to work on."""
    return str(shutil.copytree(made, tmp_path / "lake"))


def said(*words: str, code: int = 0) -> str:
    done: Result = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("command", [["trace"], ["cache", "list"], ["cache", "prune"]])
def test_every_command_has_an_example(command: list[str]) -> None:
    assert f"Example: earloom {' '.join(command)}" in " ".join(said(*command, "--help").split())


def test_a_speaker_for_people(lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(_shown(capsys, lake, "speaker", "s2").split())
    assert "talk/v1 5 clips (1 test, 4 train), 5.0 s, 4 shards" in text
    assert "salmonn/2-lora-bb trained on 4 clips" in text
    assert "talker/1 @candidate trained on 4 clips" in text
    assert "whisper, pooled by 4" in text
    assert text.index("take speaker s2 out of /data/talk: 5 files") < text.index("earloom ingest")
    assert text.index("earloom ingest") < text.index("retrain talker: earloom run --arch salmonn name=talker")
    assert text.index("retrain talker") < text.index(f"remove {lake}/audio/talk/v1")
    assert text.index(f"remove {lake}/audio/talk/v1") < text.index("earloom cache prune --unreachable --yes")


def test_markup_in_names_is_shown_as_it_is(lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "speaker [red]x[/]" in _shown(capsys, lake, "speaker", "[red]x[/]")


def _shown(capsys: pytest.CaptureFixture[str], lake: str, kind: str, name: str) -> str:
    from rich.console import Console

    from pipelines import progress, tracing

    old, progress.console = progress.console, Console(width=300, highlight=False)
    try:
        tracing.show(tracing.trace(lake, kind, name), lake)
    finally:
        progress.console = old
    return capsys.readouterr().out


def test_a_speaker_for_programs(lake: str) -> None:
    told = json.loads(said("trace", "--speaker", "s2", "--lake", lake, "--json"))
    assert told["closed"] is True
    assert [part["clips"] for part in told["audio"]] == [5]
    assert [(model["name"], model["version"]) for model in told["models"]] == [("talker", "1")]
    names = ["audio/talk/v1", f"units/{'b' * 16}", "runs/salmonn/stages/1-adapt-aa", "runs/salmonn/stages/2-lora-bb"]
    names += ["runs/salmonn/talk-r1", *(f"features/{c * 16}/talk/v1" for c in "aef")]
    assert told["remove"] == [f"{lake}/{name}" for name in names]
    assert len(told["remedy"]) == 9


def test_what_the_remedy_says_leaves_nothing(lake: str) -> None:
    told = json.loads(said("trace", "--speaker", "s2", "--lake", lake, "--json"))
    for url in told["remove"]:
        if "/features/" not in url:
            storage.remove_tree(url)
    said("cache", "prune", "--unreachable", "--yes", "--lake", lake)
    assert storage.find(lake) == []


def test_a_model_by_its_names(lake: str) -> None:
    for name in ("talker", "talker/1", "talker@candidate"):
        told = json.loads(said("trace", "--model", name, "--lake", lake, "--json", "--all"))
        assert (told["kind"], told["name"]) == ("model", "talker/1")
        assert len(told["audio"][0]["first_files"]) == 16
        assert (told["remedy"], told["remove"]) == ([], [])
    graph = read_graph(lake)
    for name in ("talker@best", "talker/2", "other"):
        with pytest.raises(LookupError, match="talker"):
            model_folder(graph, name)
    assert not os.path.exists("/nowhere.db")
    (run,) = graph.runs
    add_run(lake, "talk-r2", *_made(lake), version="2")
    graph = read_graph(lake)
    assert model_folder(graph, "talker") == ("talker/2", f"{lake}/runs/salmonn/talk-r2/model")
    assert model_folder(graph, "talker/1") == ("talker/1", f"{run.url}/model")
    with pytest.raises(LookupError):  # two versions: who has the alias now, only the registry knows
        model_folder(graph, "talker@candidate")


def _made(lake: str) -> tuple:  # type: ignore[type-arg]
    graph = read_graph(lake)
    return graph.audio[0].manifest, [], list(graph.stages)


def test_a_gap_ends_with_one(lake: str) -> None:
    said("trace", "--dataset", "talk", "--lake", lake)
    storage.remove_tree(f"{lake}/runs/salmonn/stages/1-adapt-aa")
    told = json.loads(said("trace", "--model", "talker", "--lake", lake, "--json", code=1))
    assert told["closed"] is False
    assert "stage 1-adapt-aa is not in the lake" in told["gaps"][0]["lacks"]
    storage.remove_tree(f"{lake}/runs/salmonn/talk-r1/{LINEAGE}")
    told = json.loads(said("trace", "--speaker", "nobody", "--lake", lake, "--json", code=1))
    assert any("registered, but model/lineage.json is missing" in gap["lacks"] for gap in told["gaps"])


@pytest.mark.parametrize("words", [[], ["--speaker", "a", "--model", "b"]])
def test_exactly_one_thing_is_traced(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["trace", *words])
    assert isinstance(done.exception, ValueError)
    assert "--speaker, --file, --clip, --model and --dataset" in str(done.exception)


def test_users_of_a_cache_by_digest_and_place(lake: str) -> None:
    found = users(read_graph(lake))
    everybody = ["salmonn/1-adapt-aa", "salmonn/2-lora-bb", "salmonn/talk-r1"]
    assert found[f"{'a' * 16}/talk/v1"] == everybody
    assert list(found.values()) == [everybody] * 3  # digest and place of the units, digest of what is under them


def test_caches_are_listed_and_pruned(lake: str) -> None:
    caches = json.loads(said("cache", "list", "--lake", lake, "--json"))
    assert [(one["place"][0], len(one["used_by"]), one["audio"]) for one in caches] == [
        ("a", 3, True), ("e", 0, True), ("f", 3, True),
    ]  # fmt: skip
    before = storage.find(lake)
    said("cache", "prune", "--older-than", "30d", "--lake", lake)
    assert storage.find(lake) == before  # a rehearsal
    said("cache", "prune", "--older-than", "41d", "--lake", lake, "--yes")
    assert storage.find(lake) == before
    said("cache", "prune", "--older-than", "30d", "--lake", lake, "--yes")
    assert storage.list_names(f"{lake}/features") in (["a" * 16, "f" * 16], ["a" * 16, "e" * 16, "f" * 16])
    assert [one["place"][0] for one in json.loads(said("cache", "list", "--lake", lake, "--json"))] == ["a", "f"]
    assert len(before) - len(storage.find(lake)) == 4
    said("cache", "prune", "--larger-than", "1kB", "--lake", lake, "--yes", "--even-reachable")
    assert json.loads(said("cache", "list", "--lake", lake, "--json")) == []
    assert json.loads(said("trace", "--speaker", "s2", "--lake", lake, "--json", code=1))["gaps"][0][
        "lacks"
    ].startswith("the cache that it was fitted on")


def test_where_records_are_damaged_nothing_is_taken_for_unreachable(lake: str) -> None:
    storage.write_bytes(f"{lake}/audio/talk/v1/manifest.json", b"{")
    assert all(one.audio for one in caches_of(read_graph(lake)))
    prune = ["cache", "prune", "--older-than", "30d", "--lake", lake, "--yes"]
    said(*prune)
    assert [one.place[0] for one in caches_of(read_graph(lake))] == ["a", "f"]
    storage.write_bytes(f"{lake}/runs/salmonn/stages/1-adapt-aa/{INPUTS}", b"{")
    done = CliRunner().invoke(app, prune)
    assert "1 stages or runs do not say which caches they use" in str(done.exception)
    said(*prune, "--even-reachable")
    assert caches_of(read_graph(lake)) == []


def test_amounts() -> None:
    seconds, sizes = {"d": 86_400.0, "h": 3600.0}, {"GB": 10**9, "GiB": 2**30}
    assert quantity("30d", seconds, "") == 2_592_000
    assert quantity("1.5 h", seconds, "") == 5400
    assert [quantity(text, sizes, "") for text in ("10GB", "1gib")] == [10**10, 2**30]
    for text in ("30", "d", "-1d", "1x", "nan d"):
        with pytest.raises(ValueError, match="write it as in 30d"):
            quantity(text, seconds, "30d")


@pytest.mark.slow
def test_stages_are_noted_before_they_begin(tmp_path: Path) -> None:
    """What training writes is what trace reads; a record that is there is left alone."""
    from pipelines.train import note_inputs

    lake = str(tmp_path)
    audio = add_audio(lake, "talk", "v1", index_table(4))
    features = add_cache(lake, audio, "f" * 16)
    urls = [f"{lake}/runs/salmonn/stages/{name}" for name in ("1-a", "2-b")]
    work = SimpleNamespace(stages=[(None, url) for url in urls], audio=audio, features={"audio": features})
    note_inputs(work)  # type: ignore[arg-type]
    first = [storage.read_bytes(f"{url}/{INPUTS}") for url in urls]
    note_inputs(work)  # type: ignore[arg-type]
    assert [storage.read_bytes(f"{url}/{INPUTS}") for url in urls] == first
    graph = read_graph(lake)
    assert graph.gaps == []
    assert [made.record.stages for made in graph.stages.values() if made.record] == [(), ("1-a",)]
    assert [made.finished for made in graph.stages.values()] == [False, False]
