"""Hostile names of parts, models, data sets, shards and keys never lead out of the lake, on a disk and on S3."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from components.registry.names import check_alias, check_name, parse_model
from components.schema import Annotation, Recording
from components.shards.group import assign_keys
from infra import storage
from infra.names import pieces, single
from pipelines.overrides import run_config

# What names are attacked with, and everything else.
HOSTILE = (
    "..",
    ".",
    "",
    "/",
    "\\",
    "\0",
    "://",
    "file://",
    "s3://other/",
    "~",
    "%2e%2e",
    "::",
    "C:",
    "\n",
    "‥",
    "．．",
)
NAMES = st.one_of(
    st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6).map("/".join),
    st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6).map("".join),
    st.text(min_size=1, max_size=40),
)
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A lake beside which something lies that is not to be touched."""
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "lake").mkdir()
    return tmp_path / "lake"


def beside(lake: Path) -> dict[str, str]:
    """Every file around the lake, with its content."""
    return {
        str(path.relative_to(lake.parent)): path.read_text()
        for path in lake.parent.rglob("*")
        if path.is_file() and not path.is_relative_to(lake)
    }


@QUICK
@given(st.lists(NAMES, min_size=1, max_size=3))
@example(["../outside"])
@example(["a", "../../outside"])
@example(["/etc/passwd"])
def test_what_is_written_below_a_folder_stays_there(lake: Path, parts: list[str]) -> None:
    try:
        url = storage.join(str(lake), *parts)
    except ValueError:
        return
    assert os.path.normpath(url) == url
    assert url == str(lake) or url.startswith(f"{lake}/")
    with suppress(OSError, UnicodeEncodeError):  # no file can have this name, or a folder has it
        storage.write_bytes(url, b"written")
    assert beside(lake) == {"outside": "mine"}


@QUICK
@given(NAMES)
@example("..")
@example("a/../..")
def test_pieces_are_names_and_nothing_else(part: str) -> None:
    try:
        found = pieces(part)
    except ValueError:
        assert ".." in part.split("/") or "\0" in part or "://" in part or part.startswith("/")
        return
    assert all(piece and piece not in (".", "..") and "/" not in piece for piece in found)


@QUICK
@given(NAMES)
@example("a" * 256)
def test_one_name_is_one_name(lake: Path, name: str) -> None:
    try:
        assert single(name, "a file") == name
    except ValueError:
        bad = name in ("", ".", "..") or "/" in name or "\0" in name
        assert bad or len(name.encode("utf-8", "surrogateescape")) > 255
        return
    assert (lake / name).parent == lake


@pytest.mark.parametrize("part", ["%2e%2e/x", "a/%2E%2e/x", "%2e%2e%2fx", "..%5cx", "..%2f"])
def test_on_the_web_dots_may_be_spelled_otherwise(part: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        storage.join("https://host/data", part)
    assert storage.join("/data", part) == f"/data/{part.rstrip('/')}"  # on a disk these are letters


@QUICK
@given(NAMES)
@example("../x")
@example("a/..")
@example("model\n")
def test_names_of_models_and_aliases_are_one_plain_word(name: str) -> None:
    for check in (check_name, check_alias):
        try:
            check(name)
        except ValueError:
            continue
        assert pieces(name) == [name] == [os.path.basename(name)]
        assert name.isascii()
        assert name.isprintable()
    try:
        parsed = parse_model(name)
    except ValueError:
        return
    assert all(part is None or pieces(part) == [part] for part in parsed)


@pytest.mark.slow
@FEW
@given(st.one_of(st.none(), NAMES), NAMES)
@example("../../x", "a")
def test_a_data_set_is_one_folder_of_the_lake(lake: Path, dataset: str | None, folder: str) -> None:
    from pipelines.locate import Workspace

    try:
        config = run_config(
            {"arch": "funasr_llm", "data": f"/data/{folder}", "lake": str(lake), "dataset": dataset, "preset": "tiny"}
        )
    except ValueError:
        return
    work = Workspace(config)
    assert pieces(work.dataset) == [work.dataset]
    root = storage.join(str(lake), "audio", work.dataset, "0123456789ab")
    assert Path(root).parents[2] == lake
    assert pieces(work.model_name) == [work.model_name]


@QUICK
@given(st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_keys_of_clips_are_plain_whatever_a_manifest_calls_them(ids: list[str]) -> None:
    recordings = [Recording(url="/d/a.wav", annotation=Annotation(id=one), digest="0") for one in ids]
    keys = assign_keys(recordings)
    assert len({key.lower() for key in keys}) == len(ids)
    for key in keys:
        assert pieces(key) == [key]
        assert key.isascii()
        assert not key.startswith(("-", "."))
        assert "." not in key  # where WebDataset would end it


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_s3_nothing_is_written_outside_the_lake(bucket: str) -> None:
    import boto3

    client = boto3.client("s3")
    client.put_object(Bucket="lake", Key="outside", Body=b"mine")
    root = f"{bucket}/inside/lake"

    @FEW
    @given(st.lists(NAMES, min_size=1, max_size=2))
    @example(["../../outside"])
    @example(["..", "..", "outside"])
    def attack(parts: list[str]) -> None:
        try:
            storage.write_bytes(storage.join(root, *parts), b"written")
        except (ValueError, OSError):  # it leads out, or the store takes no such name
            return

    attack()
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="lake")["Contents"]]
    assert [key for key in keys if not key.startswith("inside/lake")] == ["outside"]
    assert client.get_object(Bucket="lake", Key="outside")["Body"].read() == b"mine"


@pytest.mark.slow
def test_a_hostile_key_in_the_lake_is_not_read_and_not_copied(bucket: str, tmp_path: Path) -> None:
    """Somebody who may write into the bucket names an object so that a copy of it would land elsewhere."""
    import boto3

    from pipelines.listening import local_folder

    client = boto3.client("s3")
    for key in ("model/manifest.json", "model/../../../escaped", "model/.."):
        client.put_object(Bucket="lake", Key=key, Body=json.dumps({"key": key}).encode())
    scratch = tmp_path / "deep" / "scratch"
    scratch.mkdir(parents=True)
    with pytest.raises(ValueError, match="leads out of its folder"):
        local_folder(f"{bucket}/model", scratch)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"manifest.json"}


def test_an_index_of_shards_that_leads_out_is_refused(tmp_path: Path) -> None:
    """An index that was changed by somebody else names its shards as it likes."""
    from components.shards.reader import ShardReader

    (tmp_path / "secret.tar").write_bytes(b"x" * 4096)
    root = tmp_path / "lake" / "audio"
    root.mkdir(parents=True)
    for name in ("../../secret.tar", str(tmp_path / "secret.tar"), "file:///etc/passwd"):
        row = {"key": "k", "shard": name, "json_offset": 0, "json_size": 4}
        with pytest.raises(ValueError, match="leads out of its folder"):
            ShardReader(str(root)).clip(row)
