"""A new version of a data set takes over the feature shards of what did not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_helpers import SmallEncoder, make_shards, rows_of

from components.audio.encode import to_int16
from components.digest import digest_file
from components.features.extract import Target, extract_all
from components.features.key import feature_key
from components.features.parts import FeaturePart
from components.features.reuse import Known
from components.features.store import FeatureStore, publish_features
from components.schema import AudioManifest
from components.seal import sealed
from infra.storage import join

Version = tuple[AudioManifest, list[dict[str, Any]], str]


def waves(seed: int) -> list[Any]:
    chance = np.random.default_rng(seed)
    return [to_int16((0.1 * chance.standard_normal(int(n))).astype(np.float32)) for n in (9000, 16_000, 4000)]


def version(folder: Path, seeds: list[int]) -> Version:
    audio, index = make_shards(folder, [waves(seed) for seed in seeds])
    return audio, index, str(folder)


def cached(given: Version, encoder: SmallEncoder, folder: str, name: str, known: bool = True) -> list[FeaturePart]:
    audio, index, root = given
    target = Target(encoder, join(folder, "noise", name), folder=folder if known else None)
    return [extract_all(shard, rows_of(index, shard), root, [target])[0] for shard in audio.shards]


@pytest.mark.parametrize("remote", [False, True])
def test_only_new_shards_are_encoded_and_the_cache_is_the_one_that_is_made_alone(tmp_path: Path, remote: bool) -> None:
    folder = f"memory://reuse-{tmp_path.name}/abc" if remote else str(tmp_path / "features/abc")
    first, second = version(tmp_path / "one", [0, 1]), version(tmp_path / "two", [0, 1, 2])
    encoder = SmallEncoder()
    made = cached(first, encoder, folder, "1")
    calls = encoder.calls
    again = cached(second, encoder, folder, "2")
    assert encoder.calls - calls == 3 and calls == 6  # the three lengths of the one new shard
    assert [part.shard.sha256 for part in again[:2]] == [part.shard.sha256 for part in made]
    assert [part.reused for part in again] == [True, True, False]
    alone = cached(second, encoder, str(tmp_path / "alone"), "2", known=False)
    assert [part.model_dump_json() for part in again] == [part.model_dump_json() for part in alone]
    key = feature_key(encoder)
    manifest = publish_features(join(folder, "noise", "2"), key, second[0])
    assert manifest == publish_features(str(tmp_path / "alone/noise/2"), key, second[0])
    FeatureStore(join(folder, "noise", "2")).verify()


def test_a_shard_under_another_number_keeps_its_bytes(tmp_path: Path) -> None:
    folder, encoder = str(tmp_path / "features/abc"), SmallEncoder()
    first = version(tmp_path / "one", [0, 1])
    made = cached(first, encoder, folder, "1")
    audio, index, root = first
    moved = audio.shards[1].model_copy(update={"name": "shard-000007.tar"})
    (Path(root) / "shard-000001.tar").rename(Path(root) / moved.name)
    rows = [row | {"shard": moved.name} for row in rows_of(index, audio.shards[1])]
    part = extract_all(moved, rows, root, [Target(encoder, join(folder, "noise", "2"), folder=folder)])[0]
    assert part.reused and part.shard == made[1].shard.model_copy(update={"name": moved.name})
    assert digest_file(tmp_path / "features/abc/noise/2/shard-000007.tar") == made[1].shard.sha256


@pytest.mark.parametrize("harm", ["note", "place", "unsealed", "record", "tar", "bit", "gone"])
def test_what_is_damaged_there_is_made_anew_here(tmp_path: Path, harm: str) -> None:
    folder, encoder = tmp_path / "features/abc", SmallEncoder()
    given = version(tmp_path / "one", [0])
    made = cached(given, encoder, str(folder), "1")
    note, there = next((folder / "known").iterdir()), folder / "noise/1"
    tar = there / "shard-000000.tar"
    if harm == "note":
        note.write_text('{"place": 3')
    elif harm == "place":
        note.write_bytes(sealed(Known(place="../../elsewhere", shard="shard-000000.tar")))
    elif harm == "unsealed":  # as it was before records had seals
        note.write_text('{"place": "noise/1", "shard": "shard-000000.tar"}')
    elif harm == "record":
        (there / "parts/shard-000000.json").write_text("{}")
    elif harm == "tar":
        tar.write_bytes(tar.read_bytes()[:-1])
    elif harm == "bit":
        data = bytearray(tar.read_bytes())
        data[700] ^= 1
        tar.write_bytes(data)
    else:
        tar.unlink()
    calls = encoder.calls
    part = cached(given, encoder, str(folder), "2")[0]
    assert not part.reused and encoder.calls > calls and part == made[0]
    assert digest_file(folder / "noise/2/shard-000000.tar") == made[0].shard.sha256
