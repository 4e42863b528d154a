"""The catalogue of model folders on an sqlite file."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from components.registry.mlflow_registry import (
    DIGEST_TAG,
    catalogue,
    check_alias,
    check_name,
    curve,
    digest_folder,
    find,
    metric_key,
    parse_model,
    register,
    shown,
)


def model(folder: Path, weights: str = "w") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(weights)
    return str(folder)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('lake')}/not/there/yet/mlflow.db"


@pytest.mark.slow
def test_register_find_and_register_again(uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two", "other")
    history = [{"stage": "align", "step": i, "loss": 4.0 - i, "tasks": {"asr": 1.0}} for i in range(3)]
    first = register(
        one,
        "slam",
        {"asr/test/wer": 0.25, "bad": math.nan},
        {"arch": "slam_asr"},
        "best",
        uri,
        params={"label:x": 1},
        history=history,
    )
    assert (first.name, first.version, first.alias, first.uri, first.new) == (
        "slam",
        "1",
        "best",
        "models:/slam/1",
        True,
    )
    again = register(one, "slam", {"asr/test/wer": 0.25}, {}, None, uri)
    assert (again.version, again.new) == ("1", False)
    second = register(two, "slam", {"asr/test/wer": 0.2}, {}, "best", uri)
    assert (second.version, second.new) == ("2", True)

    assert find("slam", uri)[:2] == find("slam@best", uri)[:2] == find("slam@latest", uri)[:2] == (two, "2")
    found = find("slam/1", uri)
    assert found.url == one
    assert found.tags["arch"] == "slam_asr"
    assert found.tags[DIGEST_TAG] == digest_folder(one)
    assert [(entry.version, entry.aliases) for entry in catalogue(uri)] == [("2", ("best",)), ("1", ())]
    assert register(one, "slam", {}, {}, "best", uri).new is False
    assert find("slam@best", uri).version == "1"
    assert "INFO" not in capfd.readouterr().err

    from mlflow import MlflowClient

    run = MlflowClient(uri).get_run(MlflowClient(uri).get_model_version("slam", "1").run_id)
    assert run.data.metrics["asr/test/wer"] == 0.25
    assert "bad" not in run.data.metrics
    assert run.info.status == "FINISHED"
    assert run.data.params == {"label/x": "1"}
    assert [point.value for point in MlflowClient(uri).get_metric_history(run.info.run_id, "align/loss")] == [
        4.0,
        3.0,
        2.0,
    ]


@pytest.mark.slow
def test_a_version_whose_folder_is_gone_is_made_anew(uri: str, tmp_path: Path) -> None:
    old = model(tmp_path / "old")
    register(old, "moved", {}, {}, None, uri)
    new = str(Path(old).rename(tmp_path / "new"))
    assert register(new, "moved", {}, {}, None, uri).new is True
    assert find("moved", uri)[:2] == (new, "2")


@pytest.mark.slow
def test_what_is_missing_is_said_with_what_there_is(uri: str, tmp_path: Path) -> None:
    register(model(tmp_path / "m"), "known", {}, {}, "best", uri)
    with pytest.raises(LookupError, match=r"no model named 'unknown'.*known"):
        find("unknown", uri)
    with pytest.raises(LookupError, match=r"no alias @champion; its versions are: 1 @best"):
        find("known@champion", uri)
    with pytest.raises(LookupError, match="no version 7"):
        find("known/7", uri)
    with pytest.raises(FileNotFoundError, match="nothing to register"):
        register(str(tmp_path / "nowhere"), "known", {}, {}, None, uri)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a..b", ".hidden", "a b", "a'b", "a:b", "a" * 200, "ü", "a\n"])
def test_names_that_would_be_a_path_or_a_query_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a model's name"):
        check_name(name)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "a/b", "a b", ""])
def test_reserved_aliases_are_refused(alias: str) -> None:
    with pytest.raises(ValueError, match="cannot be an alias"):
        check_alias(alias)


def test_a_model_is_named_three_ways() -> None:
    assert parse_model("slam-asr") == parse_model("slam-asr@latest") == ("slam-asr", None, None)
    assert parse_model("slam-asr@best") == ("slam-asr", "best", None)
    assert parse_model("slam-asr/03") == ("slam-asr", None, "3")
    for wrong in ("a/b", "a@", "/3", "a/../b", "a@b/3"):
        with pytest.raises(ValueError, match=r"cannot be|must be a version"):
            parse_model(wrong)


def test_curves_hold_only_numbers_and_names_that_every_server_takes() -> None:
    rows = [{"stage": "s", "step": 1, "loss": math.nan, "lr": 0.1, "tasks": {"label:x": 0.5}, "note": "n"}, {"loss": 1}]
    assert curve(rows) == [("s/lr", 0.1, 1), ("s/share/label:x", 0.5, 1)]
    assert metric_key("s/share/label:x") == "s/share/label/x"


def test_no_password_is_shown() -> None:
    assert shown("https://me:secret@host:5000/x") == "https://***@host:5000/x"


def test_the_module_is_quick_to_import() -> None:
    check = "import sys, components.registry.mlflow_registry; sys.exit('mlflow' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", check], cwd=root, check=False).returncode == 0
