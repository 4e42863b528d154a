"""components/shards/ingest.py and publish.py: shards that anybody can read, the same bytes whatever happened before."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile as sf
from blake3 import blake3
from shard_helpers import all_bytes, make_data, plan, put, run_ingest, run_publish, tone

from components.audio.decode import BadAudio, decode
from components.audio.encode import to_int16
from components.digest import digest_file
from components.schema import AudioManifest, Clip, Recording, Reject
from components.shards import ingest, samples
from components.shards.index import SCHEMA, read_index, read_manifest
from components.shards.ingest import ingest_config, ingest_group
from components.shards.parts import group_digest
from components.shards.publish import audio_root, dataset_version, publish, up_to_date
from components.shards.reader import ShardReader, verify_shard
from components.shards.samples import Sample, make_samples
from components.shards.settings import Ingest
from infra import storage


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, list[Recording]]:
    root = str(tmp_path / "data")
    return root, make_data(root)


@pytest.fixture
def whole(data: tuple[str, list[Recording]], tmp_path: Path) -> tuple[str, AudioManifest]:
    """A data set that was made without a disturbance: 7 clips of 9 files in 3 shards."""
    root = audio_root(str(tmp_path / "lake"), "tones", "v1")
    run_ingest(root, data[1], data[0])
    return root, run_publish(root, data[1], data[0])


def test_a_data_set_has_its_shards_index_rejects_and_manifest(whole: tuple[str, AudioManifest], tmp_path: Path) -> None:
    root, manifest = whole
    assert root == str(tmp_path / "lake/audio/tones/v1")
    tars = [f"shard-00000{i}.tar" for i in range(3)]
    assert storage.list_names(root) == [
        "checks.json",
        "manifest.json",
        "parts",
        "rejects.jsonl",
        "samples.parquet",
        *tars,
    ]
    assert read_manifest(root) == manifest
    assert [shard.samples for shard in manifest.shards] == [2, 2, 3]
    assert (manifest.samples, manifest.rejected, manifest.splits) == (7, 2, {"dev": 3, "train": 4})
    assert manifest.seconds == pytest.approx(sum(0.2 + 0.05 * i for i in range(7)), abs=1e-3)
    assert manifest.licences == {"CC0-1.0": 7}
    assert manifest.sources == (str(tmp_path / "data"), "synthetic")
    own = {"per_shard": 3, "sample_rate": 16_000, "schema_version": 1, "ingest_version": 3}
    assert manifest.config == Ingest().model_dump(mode="json") | own
    assert manifest.asides == {"decode": 1, "read": 1}
    for shard in manifest.shards:
        tar = f"{root}/{shard.name}"
        assert (digest_file(tar), os.path.getsize(tar)) == (shard.sha256, shard.bytes)
        verify_shard(root, shard)


def test_rejects_say_what_and_why(whole: tuple[str, AudioManifest]) -> None:
    lines = storage.read_text(storage.join(whole[0], "rejects.jsonl")).splitlines()
    rejects = [Reject.model_validate_json(line) for line in lines]
    assert [reject.original for reject in rejects] == ["broken.wav", "missing.wav"]
    assert [reject.id for reject in rejects] == ["broken", "missing"]
    with pytest.raises(BadAudio) as bad:
        decode(b"this is no audio", "broken.wav")
    assert [reject.reason for reject in rejects] == [bad.value.reason, ingest.MISSING]


def test_tars_are_plain_and_without_a_trace_of_the_machine(whole: tuple[str, AudioManifest]) -> None:
    root, manifest = whole
    with tarfile.open(f"{root}/{manifest.shards[0].name}") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"spk_{i % 2}_clip_{i}.{suffix}" for i in (0, 1) for suffix in ("flac", "json")
    ]
    for member in members:
        assert (member.type, member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (
            tarfile.REGTYPE,
            0,
            0,
            0,
            "",
            "",
            0o644,
        )
        assert member.pax_headers == {}


@pytest.mark.slow  # webdataset imports torch
def test_plain_webdataset_reads_the_same_keys_records_and_audio(whole: tuple[str, AudioManifest]) -> None:
    webdataset = pytest.importorskip("webdataset")
    root, manifest = whole
    urls = [f"{root}/{shard.name}" for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    rows = read_index(root).to_pylist()
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    reader = ShardReader(root)
    for sample, row in zip(samples, rows, strict=True):
        assert set(sample) >= {"flac", "json"}
        assert Clip.model_validate_json(sample["json"]) == reader.clip(row)
        assert json.loads(sample["json"])["text"] == row["text"]
        audio, rate = sf.read(io.BytesIO(sample["flac"]), dtype="float32")
        assert rate == 16_000
        assert np.array_equal(audio, reader.waveform(row))


def test_the_index_says_what_the_records_say(whole: tuple[str, AudioManifest]) -> None:
    root, _ = whole
    table = read_index(root)
    assert table.schema.equals(SCHEMA)
    reader = ShardReader(root)
    for row in table.to_pylist():
        clip = reader.clip(row)
        same = (
            "key",
            "id",
            "seconds",
            "samples",
            "text",
            "language",
            "speaker",
            "gender",
            "split",
            "caption",
            "original",
            "audio_digest",
        )
        assert {name: row[name] for name in same} == {name: getattr(clip, name) for name in same}
        assert (json.loads(row["labels"]), json.loads(row["translation"])) == (clip.labels, clip.translation)
        assert (tuple(json.loads(row["marks"])), row["text_length"]) == (clip.marks, len(clip.text or ""))
        assert len(reader.waveform(row)) == row["samples"] == round(row["seconds"] * 16_000)
        assert row["audio_offset"] % 512 == row["json_offset"] % 512 == 0
        assert clip.original == f"{clip.id}.{clip.original.rpartition('.')[2]}"
    assert read_index(root, ["key", "seconds"]).column_names == ["key", "seconds"]


def test_a_flac_that_fits_is_kept_and_anything_else_encoded(tmp_path: Path) -> None:
    for name, content, kept in [
        ("fits.flac", tone(0.3, 200, 16_000, "FLAC"), True),
        ("deep.flac", tone(0.3, 200, 16_000, "FLAC", "PCM_24"), False),
        ("fast.flac", tone(0.3, 200, 22_050, "FLAC"), False),
        ("plain.wav", tone(0.3, 200), False),
    ]:
        recording = put(str(tmp_path), name, content)
        keyed = plan([recording], str(tmp_path))[0][0][0]
        (sample,) = make_samples(keyed, content, name)
        assert isinstance(sample, Sample)
        assert (sample.audio == content) == kept
        expected = to_int16(decode(content, name).samples)
        stored, rate = sf.read(io.BytesIO(sample.audio), dtype="int16")
        assert (rate, np.array_equal(stored, expected)) == (16_000, True)
        assert sample.clip.audio_digest == f"blake3:{blake3(expected.tobytes()).hexdigest()}"
        assert (sample.clip.samples, sample.clip.original) == (len(expected), name)


def test_a_second_run_reuses_every_group(data: tuple[str, list[Recording]], whole: tuple[str, AudioManifest]) -> None:
    root, manifest = whole
    before = all_bytes(root)
    times = [os.stat(f"{root}/{shard.name}").st_mtime_ns for shard in manifest.shards]
    reports = run_ingest(root, data[1], data[0])
    assert all(report.reused for report in reports)
    assert [(report.samples, report.rejected) for report in reports] == [(2, 1), (2, 1), (3, 0)]
    assert run_publish(root, data[1], data[0]) == manifest == up_to_date(root)
    assert all_bytes(root) == before
    assert [os.stat(f"{root}/{shard.name}").st_mtime_ns for shard in manifest.shards] == times


@pytest.mark.parametrize(
    "lost",
    [
        ["shard-000001.tar"],
        ["parts/shard-000000.json"],
        ["parts/shard-000002.json", "shard-000002.tar", "manifest.json"],
        ["samples.parquet", "rejects.jsonl", "manifest.json"],
        ["samples.parquet"],
    ],
)
def test_whatever_was_lost_is_made_again_to_the_same_bytes(
    lost: list[str], data: tuple[str, list[Recording]], whole: tuple[str, AudioManifest]
) -> None:
    root, manifest = whole
    before = all_bytes(root)
    for name in lost:
        os.unlink(f"{root}/{name}")
    assert up_to_date(root) is None or lost == ["parts/shard-000000.json"]
    touched = {name[-10:-4] if name.endswith("tar") else name[-11:-5] for name in lost if "shard" in name}
    reports = run_ingest(root, data[1], data[0])
    assert {f"{report.group:06d}" for report in reports if not report.reused} == touched
    assert run_publish(root, data[1], data[0]) == manifest
    assert all_bytes(root) == before


def test_a_damaged_index_is_made_again_also_by_a_pyarrow_that_writes_other_bytes(tmp_path: Path) -> None:
    source, root = str(tmp_path / "data"), str(tmp_path / "lake/tones/one")
    recordings = make_data(source)
    run_ingest(root, recordings, source)
    manifest, index = run_publish(root, recordings, source), Path(root, "samples.parquet")
    written = bytearray(index.read_bytes())
    written[len(written) // 2] ^= 1
    index.write_bytes(written)
    assert up_to_date(root) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("components.shards.publish.table_bytes", without_compression)
        again = run_publish(root, recordings, source)
    assert again.index_sha256 != manifest.index_sha256
    assert (again.digest, again.shards) == (manifest.digest, manifest.shards)
    assert up_to_date(root) == again
    assert read_index(root).num_rows == manifest.samples


def without_compression(table: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none")
    return buffer.getvalue()


@pytest.mark.parametrize("point", ["make_samples", "write_tar", "upload", "write_bytes"])
def test_a_kill_at_any_point_and_a_second_run_give_the_same_bytes(
    point: str,
    data: tuple[str, list[Recording]],
    whole: tuple[str, AudioManifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed, calls, real = str(tmp_path / "killed/v1"), 0, getattr(ingest, point)

    def kill(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, point, kill)
        with pytest.raises(KeyboardInterrupt):
            run_ingest(killed, data[1], data[0])
    half = storage.scratch(killed) / "shard-000001.tar.dead"
    half.mkdir()
    (half / "shard-000001.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"of 3 shards .* are not there yet .*run the ingest stage again"):
        run_publish(killed, data[1], data[0])
    with pytest.raises(FileNotFoundError, match="run the ingest stage"):
        read_index(killed)
    reports = run_ingest(killed, data[1], data[0])
    assert [report.reused for report in reports] == [point != "make_samples", False, False]
    run_publish(killed, data[1], data[0])
    assert all_bytes(killed) == all_bytes(whole[0])


def test_a_truncated_tar_is_made_again(data: tuple[str, list[Recording]], whole: tuple[str, AudioManifest]) -> None:
    root, manifest = whole
    before = all_bytes(root)
    os.truncate(f"{root}/shard-000001.tar", 5000)
    assert up_to_date(root) is None
    with pytest.raises(ValueError, match=r"shard-000001\.tar is damaged \(it has 5,000 bytes, not .*delete it and run"):
        verify_shard(root, manifest.shards[1])
    assert [report.reused for report in run_ingest(root, data[1], data[0])] == [True, False, True]
    assert all_bytes(root) == before


def test_groups_in_any_order_and_another_lake_give_the_same_bytes(
    data: tuple[str, list[Recording]],
    whole: tuple[str, AudioManifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests have files in the common one
    remote = f"memory://{uuid.uuid4().hex}/v1"
    run_ingest(remote, data[1], data[0], only=(2, 0, 1))
    run_publish(remote, data[1], data[0])
    assert all_bytes(remote) == all_bytes(whole[0])
    reader = ShardReader(remote)
    for row in read_index(remote).to_pylist():
        assert reader.clip(row).key == row["key"]
        assert len(reader.waveform(row)) == row["samples"]
    for shard in read_manifest(remote).shards:
        verify_shard(remote, shard)
    assert not [name for name in os.listdir(storage.scratch(remote)) if name.startswith("shard-")]


def test_where_the_data_lie_does_not_matter(tmp_path: Path) -> None:
    found = []
    for place in (str(tmp_path / "here"), str(tmp_path / "far/there"), f"memory://{uuid.uuid4().hex}/there"):
        recordings = [item for item in make_data(place) if "missing" not in item.url]
        root = str(tmp_path / f"lake-{len(found)}")
        run_ingest(root, recordings, place)
        manifest = run_publish(root, recordings, place)
        found.append((manifest.version, manifest.digest, [shard.sha256 for shard in manifest.shards]))
    assert found[0] == found[1] == found[2]


def test_a_group_with_nothing_usable_has_no_shard(tmp_path: Path) -> None:
    source, root = str(tmp_path / "data"), str(tmp_path / "lake")
    recordings = [put(source, f"bad{i}.wav", b"nothing") for i in range(3)] + [put(source, "good.wav", tone(0.2, 200))]
    reports = run_ingest(root, recordings, source)
    assert (reports[0].shard, reports[0].samples, reports[0].rejected, reports[0].bytes) == (None, 0, 3, 0)
    manifest = run_publish(root, recordings, source)
    assert [shard.name for shard in manifest.shards] == ["shard-000001.tar"]
    assert run_ingest(root, recordings, source)[0].reused
    only_bad, lake = recordings[:3], str(tmp_path / "other")
    run_ingest(lake, only_bad, source)
    with pytest.raises(ValueError, match=r"none of 3 inputs could be used, for example bad0\.wav: .*rejects\.jsonl"):
        run_publish(lake, only_bad, source)
    assert len(storage.read_text(f"{lake}/rejects.jsonl").splitlines()) == 3
    assert not storage.exists(f"{lake}/manifest.json")


def test_each_fault_of_a_file_is_its_own_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = str(tmp_path / "data"), str(tmp_path / "lake")
    names = ("folder", "changed", "large", "crash", "surprise", "good")
    recordings = [put(source, f"{name}.wav", tone(0.2, 200 + i)) for i, name in enumerate(names)]
    os.unlink(f"{source}/folder.wav")
    os.mkdir(f"{source}/folder.wav")
    Path(f"{source}/changed.wav").write_bytes(tone(0.3, 300))
    Path(f"{source}/large.wav").write_bytes(bytes(9000))
    monkeypatch.setattr(ingest, "MAX_BYTES", 8000 + 1900)
    os.truncate(f"{source}/large.wav", 9901)
    decoded: list[str] = []

    def odd(data: bytes, name: str, *how: Any) -> Any:
        decoded.append(name)
        if name == "surprise.wav":
            raise RuntimeError("never foreseen")
        return decode(data, name, *how)

    monkeypatch.setattr(samples, "decode", odd)
    told: list[str] = []
    groups, _ = plan(recordings, source, 10)
    refused = {"crash": "the decoder crashed twice"}
    report = ingest_group(0, groups[0], root, source, refused=refused, before=told.append)
    assert (report.samples, report.rejected) == (1, 5)
    run = storage.read_json(f"{root}/parts/shard-000000.json")
    reasons = {reject["id"]: reject["reason"] for reject in run["rejects"]}
    assert list(reasons) == ["folder", "changed", "large", "crash", "surprise"]
    assert "cannot be read (is a folder)" in reasons["folder"]
    assert reasons["changed"] == ingest.CHANGED
    assert "larger than" in reasons["large"]
    assert reasons["crash"] == "the decoder crashed twice"
    assert "RuntimeError: never foreseen" in reasons["surprise"]
    assert decoded == ["surprise.wav", "good.wav"]
    assert told == list(names)


def test_a_store_that_cannot_be_reached_stops_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"memory://{uuid.uuid4().hex}"
    recordings = [put(source, f"{i}.wav", tone(0.2, 200 + i)) for i in range(3)]
    faults: dict[str, Exception] = {"1.wav": OSError("cannot be reached")}
    real = ingest.read_bytes

    def flaky(url: str) -> bytes:
        if fault := faults.get(url.rpartition("/")[2]):
            raise fault
        return real(url)

    monkeypatch.setattr(ingest, "read_bytes", flaky)
    with pytest.raises(OSError, match="cannot be reached"):
        run_ingest(str(tmp_path / "a"), recordings, source)
    assert storage.find(str(tmp_path / "a")) == []
    faults["1.wav"] = PermissionError("forbidden")
    assert run_ingest(str(tmp_path / "b"), recordings, source)[0].rejected == 1
    faults |= {f"{i}.wav": PermissionError("forbidden") for i in range(3)}
    with pytest.raises(PermissionError, match=r"refuses all 3 files .*check the credentials"):
        run_ingest(str(tmp_path / "c"), recordings, source)


def test_the_version_follows_the_data_the_rejects_and_the_configuration(tmp_path: Path) -> None:
    source = str(tmp_path / "data")
    recordings = [put(source, f"{i}.wav", tone(0.2, 200 + i), text=f"{i}") for i in range(3)]
    config, reject = ingest_config(), Reject(original="x", id="x", reason="y")
    version = dataset_version(recordings, [], config, source)
    assert len(version) == 12
    assert int(version, 16) >= 0
    assert version == dataset_version(list(recordings), [], ingest_config(256), source)
    first, second, third = recordings
    other = second.model_copy(update={"annotation": second.annotation.model_copy(update={"text": "other"})})
    changed = second.model_copy(update={"digest": "0"})
    lists = [recordings[:2], recordings[::-1], [first, other, third], [first, changed, third]]
    versions = {version, *(dataset_version(items, [], config, source) for items in lists)}
    versions |= {
        dataset_version(recordings, [reject], config, source),
        dataset_version(recordings, [], ingest_config(9), source),
    }
    assert len(versions) == 7
    groups, _ = plan(recordings, source)
    assert group_digest(groups[0], source, Ingest()) != group_digest(groups[0][:2], source, Ingest())


def test_a_data_set_is_never_published_over_another(
    data: tuple[str, list[Recording]], whole: tuple[str, AudioManifest]
) -> None:
    root = whole[0]
    before = storage.read_bytes(f"{root}/manifest.json")
    fewer = data[1][1:]
    run_ingest(root, fewer, data[0])
    groups, rejects = plan(fewer, data[0])
    with pytest.raises(ValueError, match=r"was published from other shards.*remove that folder"):
        publish(root, "tones", "v1", groups, rejects, data[0], 3)
    assert storage.read_bytes(f"{root}/manifest.json") == before


def test_duplicate_ids_end_in_the_rejects(tmp_path: Path) -> None:
    source, root = str(tmp_path / "data"), str(tmp_path / "lake")
    first, second = (put(source, f"{name}.wav", tone(0.2, 200)) for name in "ab")
    second = second.model_copy(update={"annotation": first.annotation})
    run_ingest(root, [first, second], source)
    assert run_publish(root, [first, second], source).samples == 1
    reject = Reject.model_validate_json(storage.read_text(f"{root}/rejects.jsonl"))
    assert (reject.original, reject.reason[:12]) == ("b.wav", "duplicate id")


def test_real_recordings_keep_their_length(shared_data: Path, tmp_path: Path) -> None:
    from components.audio.sources import read_sources

    source, root = str(shared_data / "fsdd"), str(tmp_path / "lake")
    recordings, rejects = read_sources(source)
    assert not rejects
    run_ingest(root, recordings[:8], source, 8)
    run_publish(root, recordings[:8], source, 8)
    lines = (shared_data / "fsdd/manifest.jsonl").read_text().splitlines()
    declared = [json.loads(line)["duration"] for line in lines[:8]]
    assert read_index(root).column("seconds").to_pylist() == pytest.approx(declared, abs=2e-3)
