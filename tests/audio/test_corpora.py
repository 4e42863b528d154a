"""NeMo, Lhotse, Kaldi, Hugging Face and WebDataset, each written from scratch as these write it, whole and broken."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.audio import manifests, rows
from components.audio.decode import BadAudio, decode
from components.audio.identity import digest_of
from components.audio.inside import read_inside
from components.audio.sources import read_sources
from components.digest import digest_bytes
from components.schema import Recording, Reject
from infra import storage

FUZZ = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG_FUZZ = settings(FUZZ, max_examples=400)


def tone(pitch: float, samples: int = 1600) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, 0.3 * np.sin(2 * np.pi * pitch * np.arange(samples) / 16_000), 16_000, format="WAV")
    return buffer.getvalue()


A, B, C = tone(200), tone(300), tone(400, 800)


def fill(folder: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def audio_of(recording: Recording) -> bytes:
    if recording.inside is None:
        return storage.read_bytes(recording.url)
    return read_inside(recording.url, recording.inside)


def ids(recordings: list[Recording]) -> list[str]:
    return [recording.annotation.id for recording in recordings]


def reasons(rejects: list[Reject]) -> str:
    for reject in rejects:
        reject.model_dump_json().encode()
        assert reject.id
        assert ";" in reject.reason or ":" in reject.reason or " must " in reject.reason
    return "\n".join(f"{reject.original}: {reject.reason}" for reject in rejects)


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    with contextlib.suppress(FileNotFoundError):
        files.rm("/corpora", recursive=True)


# ---- NeMo -----------------------------------------------------------------------------------------------------------


def test_nemo_offsets_become_starts(tmp_path: Path) -> None:
    long = str(tmp_path / "wavs/long.wav")
    train = lines(
        {"audio_filepath": long, "text": "one", "duration": 1.5, "offset": 0.0},
        {"audio_filepath": long, "text": "two", "duration": 2.25, "offset": 1.5},
        {"audio_filepath": "wavs/whole.wav", "text": "whole", "duration": 0.1},
    )
    dev = lines({"audio_filepath": "wavs/long.wav", "text": "three", "offset": 3.75})
    data = fill(tmp_path, {"train_manifest.json": train, "dev_manifest.jsonl": dev, "wavs/long.wav": A})
    fill(tmp_path, {"wavs/whole.wav": B, "wavs/unnamed.wav": C})
    recordings, rejects = read_sources(data)
    assert rejects == []
    assert [(r.annotation.id, r.start, r.duration, r.annotation.split) for r in recordings] == [
        ("wavs/long@3.750", 3.75, None, "dev"),
        ("wavs/long@0.000", 0.0, 1.5, "train"),
        ("wavs/long@1.500", 1.5, 2.25, "train"),
        ("wavs/whole", 0.0, None, "train"),
    ]
    assert {r.digest for r in recordings[:3]} == {digest_of(A)}
    assert [r.start for r in read_sources(f"{data}/train_manifest.json")[0]] == [0.0, 1.5, 0.0]
    assert read_sources(f"{data}/train_manifest.json")[0][0].annotation.split is None


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"offset": -1}, "offset '-1' is not a number"),
        ({"offset": "x"}, "offset 'x' is not a number"),
        ({"offset": True}, "is not a number"),
        ({"offset": [1]}, "is not a number"),
        ({"offset": 1, "duration": 0}, "lasts 0 seconds"),
        ({"offset": 1, "duration": 10**400}, "is not a number"),
    ],
)
def test_broken_offsets(tmp_path: Path, part: dict[str, Any], expected: str) -> None:
    data = fill(tmp_path, {"manifest.jsonl": lines({"audio_filepath": "a.wav"} | part), "a.wav": A})
    recordings, rejects = read_sources(data)
    assert recordings == []
    assert expected in reasons(rejects)


# ---- Lhotse ---------------------------------------------------------------------------------------------------------


def cut(identity: str, source: str, start: float = 0.0, duration: float = 0.1, **fields: Any) -> dict[str, Any]:
    """A MonoCut as `CutSet.to_file` writes it."""
    recording = {
        "id": f"rec-{identity}",
        "sources": [{"type": "file", "channels": [0], "source": source}],
        "sampling_rate": 16000,
        "num_samples": 1600,
        "duration": 0.1,
        "channel_ids": [0],
    }
    own = {"start": start, "duration": duration, "channel": 0, "supervisions": [], "recording": recording}
    return {"id": identity, **own, "type": "MonoCut"} | fields


def spoken(text: str, start: float = 0.0, **fields: Any) -> dict[str, Any]:
    return {"id": text, "recording_id": "r", "start": start, "duration": 0.02, "channel": 0, "text": text} | fields


@pytest.mark.parametrize("packed", [False, True])
def test_lhotse_cuts(tmp_path: Path, packed: bool) -> None:
    one = spoken("hello", language="English", speaker="ann", gender="F", custom={"age": 31, "embedding": [1, 2]})
    two = [spoken("second", 0.05, speaker="bob", language="en"), spoken(" first ", speaker="ann", language="en")]
    text = lines(
        cut("whole", str(tmp_path / "audio/a.wav"), supervisions=[one]),
        cut("part", "audio/b.wav", 0.025, 0.05, supervisions=two),
        cut("silent", "audio/b.wav", 0.05, 0.05),
    )
    name = "manifests/asr_cuts_train-clean.jsonl" + ".gz" * packed
    data = fill(tmp_path, {name: gzip.compress(text.encode()) if packed else text})
    fill(tmp_path, {"audio/a.wav": A, "audio/b.wav": B, "audio/c.wav": C, "manifests/recordings.jsonl.gz": b""})
    recordings, rejects = read_sources(data)
    assert rejects == []
    assert ids(recordings) == ["whole", "part", "silent", "audio/c"]
    assert [(r.start, r.duration) for r in recordings[:3]] == [(0.0, None), (0.025, 0.05), (0.05, 0.05)]
    first, second = (r.annotation for r in recordings[:2])
    assert (first.text, first.language, first.speaker, first.gender) == ("hello", "English", "ann", "female")
    assert (first.labels, first.split) == ({"age": 31}, "train")
    assert (second.text, second.language, second.speaker) == ("first second", "en", None)
    assert [audio_of(r) for r in recordings] == [A, B, B, C]
    by_name = read_sources(f"{data}/{name}")  # whose folder does not hold the audio
    assert by_name[0] == []
    assert "give the folder above both as --data" in reasons(by_name[1][:1])


def source(kind: str, text: str = "a.wav", **fields: Any) -> dict[str, Any]:
    recording = {"id": "r", "sources": [{"type": kind, "channels": [0], "source": text}], "duration": 0.1}
    return {"recording": recording | fields}


BAD_CUTS: dict[str, tuple[dict[str, Any], str]] = {
    "command": (cut("x", "", **source("command", "touch RUN")), "a command, which is never run"),
    "memory": (cut("x", "", **source("memory")), "of type 'memory', not a file"),
    "url": (cut("x", "", **source("url", "https://example.org/a.wav")), "leads out of the data folder"),
    "outside": (cut("x", "/etc/hostname"), "leads out of the data folder"),
    "up": (cut("x", "../../a.wav"), "leads out of the data folder"),
    "mixed": ({"id": "x", "type": "MixedCut", "tracks": []}, "MixedCut has no file of its own"),
    "features": (cut("x", "a.wav", recording=None), "the cut has no recording"),
    "no sources": (cut("x", "", recording={"id": "r", "sources": []}), "has no sources"),
    "two files": (cut("x", "", **source("file", sources=[{}, {}])), "lies in 2 files"),
    "speed": (cut("x", "", **source("file", transforms=[{"name": "Speed"}])), "transformed when it is loaded"),
    "channel": (
        cut("x", "", **source("file", sources=[{"type": "file", "channels": [0, 1], "source": "a.wav"}])),
        "channel 0 of 2",
    ),
    "start": (cut("x", "a.wav", -1.0), "the start '-1.0' is not a number"),
    "empty": (cut("x", "a.wav", 0.0, 0.0), "the cut lasts 0 seconds"),
    "text": (cut("x", "a.wav", supervisions=[spoken("y") | {"text": 5}]), "is not text"),
    "supervisions": (cut("x", "a.wav", supervisions=["y"]), "not a list of objects"),
}


@pytest.mark.parametrize("case", BAD_CUTS)
def test_broken_cuts(tmp_path: Path, case: str) -> None:
    bad, expected = BAD_CUTS[case]
    data = fill(tmp_path / "in", {"cuts.jsonl": lines(cut("before", "a.wav"), bad, cut("after", "a.wav")), "a.wav": A})
    recordings, rejects = read_sources(data)
    assert ids(recordings) == ["before", "after"]
    assert expected in reasons(rejects)
    assert (len(rejects), rejects[0].id) == (1, "x")


def test_a_channel_of_all_channels_is_a_recording(tmp_path: Path) -> None:
    both = [{"type": "file", "channels": [0, 1], "source": "a.wav"}]
    multi = cut("x", "", channel=[0, 1], type="MultiCut", **source("file", sources=both))
    recordings, rejects = read_sources(fill(tmp_path, {"cuts.jsonl": lines(multi), "a.wav": A}))
    assert (ids(recordings), rejects) == (["x"], [])


# ---- Kaldi ----------------------------------------------------------------------------------------------------------


def test_kaldi_with_segments(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "train/wav.scp": f"rec1 {tmp_path}/wavs/a.wav\nrec2\twavs/b.wav\n",
        "train/segments": "utt1 rec1 0.01 0.05\nutt2 rec1 0.05 -1\nutt3 rec2 0 0.1\nutt4 rec9 0 1\nutt5 rec1 2 1\n",
        "train/text": "utt1 hello there\nutt2\nutt3 ünï\nutt7 nobody said this\n",
        "train/utt2spk": "utt1 ann\nutt2 bob\nutt3 ann\n",
        "train/spk2gender": "ann f\nbob m\n",
        "train/utt2lang": "utt1 en\nutt3 de\n",
        "wavs/a.wav": A,
        "wavs/b.wav": B,
    }
    recordings, rejects = read_sources(fill(tmp_path, files))
    assert ids(recordings) == ["utt1", "utt2", "utt3"]
    assert [(r.start, r.duration) for r in recordings] == [(0.01, 0.04), (0.05, None), (0.0, 0.1)]
    noted = [(n.text, n.speaker, n.gender, n.language, n.split) for n in (r.annotation for r in recordings)]
    assert noted == [
        ("hello there", "ann", "female", "en", "train"),
        ("", "bob", "male", None, "train"),
        ("ünï", "ann", "female", "de", "train"),
    ]
    assert [audio_of(r) for r in recordings] == [A, A, B]
    text = reasons(rejects)
    assert "train/segments: utt4: wav.scp has no recording rec9" in text
    assert "train/segments: utt5: the segment ends before it begins" in text
    assert "train/text: utt7: the utterance has a text but no audio" in text
    assert len(rejects) == 3


def test_kaldi_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    scp = f"""ok a.wav
pipe touch {ran} |
front | touch {ran}
archive raw.ark:1234
range a.wav[0:5]
stdin -
out /etc/hostname
ok b.wav
alone
"""
    data = fill(tmp_path / "in", {"wav.scp": scp.encode() + b"latin \xe9.wav\n", "a.wav": A, "b.wav": B})
    recordings, rejects = read_sources(data)
    assert (ids(recordings), audio_of(recordings[0])) == (["ok"], A)
    assert not ran.exists()
    text = reasons(rejects)
    for expected in (
        "wav.scp: pipe: the entry is a command, which is never run",
        "wav.scp: front: the entry is a command",
        "wav.scp: archive: the entry is a place in an archive",
        "wav.scp: range: the entry is a place in an archive",
        "wav.scp: stdin: the entry is a place in an archive or a stream",
        "wav.scp: out: the path leads out of the data folder",
        "wav.scp:8: wav.scp has a line for ok already",
        "wav.scp:9: the line is only a name",
        "wav.scp:10: the line is not UTF-8",
    ):
        assert expected in text
    assert len(rejects) == 9
    assert ids(read_sources(f"{data}/wav.scp")[0]) == ["ok"]


# ---- Hugging Face ---------------------------------------------------------------------------------------------------

FEATURES = {
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "sentence": {"dtype": "string", "_type": "Value"},
    "gender": {"names": ["male", "female"], "_type": "ClassLabel"},
    "intent_class": {"names": ["order", "null"], "_type": "ClassLabel"},
    "cover": {"_type": "Image"},
}
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(cells: list[Any], metadata: bool = True, kind: pa.DataType = CELL) -> pa.Table:
    count = len(cells)
    columns = {
        "cover": pa.array([{"bytes": b"png", "path": "x.png"}] * count, CELL),
        "audio": pa.array(cells, kind),
        "sentence": pa.array([f"text {number}" for number in range(count)]),
        "gender": pa.array([1] * count, pa.int64()),
        "intent_class": pa.array([number % 3 - 1 for number in range(count)], pa.int64()),
    }
    made = pa.table(columns)
    text = json.dumps({"info": {"features": FEATURES}})
    return made.replace_schema_metadata({"huggingface": text}) if metadata else made


def parquet(value: pa.Table, rows: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(value, buffer, row_group_size=rows)
    return buffer.getvalue()


def stream(value: pa.Table, rows: int = 2, **options: Any) -> bytes:
    """The bytes of an `.arrow` file of `save_to_disk`."""
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, value.schema, **options) as writer:
        writer.write_table(value, max_chunksize=rows)
    return buffer.getvalue()


CELLS = [{"bytes": A, "path": "a.wav"}, {"bytes": B, "path": None}, {"bytes": C, "path": "clips/c.wav"}]
EXPECTED = [
    ("text 0", "female", {}),
    ("text 1", "female", {"intent_class": "order"}),
    ("text 2", "female", {"intent_class": "null"}),
]


@pytest.mark.parametrize("form", ["parquet", "save_to_disk", "file format"])
@pytest.mark.parametrize("metadata", [True, False])
def test_hugging_face_on_disk(tmp_path: Path, form: str, metadata: bool) -> None:
    value = table(CELLS, metadata)
    files: dict[str, bytes | str]
    if form == "parquet":
        name = "data/train-00000-of-00001.parquet"
        files = {name: parquet(value), "data/dataset_info.json": json.dumps({"features": FEATURES}), "README.md": "x"}
    else:
        name = "train/data-00000-of-00001.arrow"
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}, {"filename": "gone.arrow"}], "_split": None}
        files = {
            name: stream(value),
            "dataset_dict.json": '{"splits": ["train"]}',
            "train/state.json": json.dumps(state),
            "train/dataset_info.json": json.dumps({"features": FEATURES}),
            "train/cache-0123456789abcdef.arrow": stream(value),
        }
    if form == "file format":
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, value.schema) as writer:
            writer.write_table(value, max_chunksize=2)
        files[name] = sink.getvalue()
    data = fill(tmp_path, files)
    recordings, rejects = read_sources(data)
    assert len(rejects) == (form != "parquet")
    assert "gone.arrow: the file is missing" in reasons(rejects) or form == "parquet"
    assert ids(recordings) == ["a", f"{name[: name.rindex('.')]}-000001", "c"]
    assert [(n.text, n.gender, n.labels) for n in (r.annotation for r in recordings)] == EXPECTED
    assert {r.annotation.split for r in recordings} == {"train"}
    assert [audio_of(r) for r in recordings] == [A, B, C]
    assert [r.digest for r in recordings] == [digest_of(A), digest_of(B), digest_of(C)]
    assert decode(audio_of(recordings[2]), "c").samples.shape == (800,)
    if form == "parquet":
        assert [r.inside for r in recordings] == [f"row {number} audio" for number in range(3)]
    assert [r.digest for r in read_sources(f"{data}/{name}")[0]] == [r.digest for r in recordings]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("embedded", [True, False])
def test_tables_in_a_store(memory: Any, form: str, embedded: bool) -> None:
    cells: list[Any] = CELLS if embedded else [{"bytes": None, "path": "a.wav"}, {"bytes": None, "path": "../x"}]
    made = parquet(table(cells)) if form == "parquet" else stream(table(cells))
    name = f"test-00000-of-00001.{form}"
    memory.pipe_file(f"/corpora/{name}", made)
    memory.pipe_file("/corpora/a.wav", A)
    recordings, rejects = read_sources("memory://corpora")
    container = storage.fingerprint(f"memory://corpora/{name}")
    if embedded:
        assert rejects == []
        assert [audio_of(r) for r in recordings] == [A, B, C, A]
        first = recordings[0]
        assert first.digest == digest_bytes(f"{container} {first.inside}".encode())
    else:
        assert [(r.annotation.split, r.inside, audio_of(r)) for r in recordings] == [("test", None, A)]
        assert "row 1: the path leads out of the data folder" in reasons(rejects)


def test_tables_in_a_store_with_audio_alone(memory: Any) -> None:
    bare = pa.array([{"bytes": A}, {"bytes": B}], pa.struct([("bytes", pa.binary())]))
    mixed = table([{"bytes": None, "path": "a.wav"}, {"bytes": B, "path": "b.wav"}])
    for name, value in {"bare": pa.table({"audio": bare}), "mixed": mixed}.items():
        memory.pipe_file(f"/corpora/{name}.parquet", parquet(value))
    memory.pipe_file("/corpora/a.wav", A)
    recordings, rejects = read_sources("memory://corpora")
    assert (ids(recordings), rejects) == (["bare-000000", "bare-000001", "a", "b"], [])
    assert [audio_of(r) for r in recordings] == [A, B, A, B]


def test_tables_of_paths_and_of_bytes(tmp_path: Path) -> None:
    cells = [{"bytes": None, "path": str(tmp_path / "a.wav")}, None, {"bytes": None, "path": "gone.wav"}]
    files: dict[str, bytes | str] = {
        "a.wav": A,
        "b.wav": B,
        "one.parquet": parquet(table(cells)),
        "two.parquet": parquet(table(["b.wav", "/etc/hostname", ""], kind=pa.string())),
        "three.arrow": stream(table([C, None], kind=pa.binary())),
        "four.parquet": parquet(table([C, None], kind=pa.binary())),
        "five.parquet": parquet(pa.table({"x": [1, 2]})),
    }
    recordings, rejects = read_sources(fill(tmp_path, files))
    assert sorted(ids(recordings)) == ["a", "b", "four-000000", "three-000000"]
    assert {r.annotation.id: audio_of(r) for r in recordings} == {"a": A, "b": B, "four-000000": C, "three-000000": C}
    text = reasons(rejects)
    assert text.count("the row has no audio") == 4
    assert "two.parquet: row 1: the path leads out" in text
    assert "gone.wav: the file is missing" in text
    assert "five.parquet: the table cannot be read: no column holds audio; name one audio" in text
    assert len(rejects) == 7


def test_rows_are_read_by_row_groups(tmp_path: Path) -> None:
    cells = [{"bytes": tone(100 + number, 200), "path": None} for number in range(40)]
    url = f"{fill(tmp_path, {'x.parquet': parquet(table(cells), rows=7)})}/x.parquet"
    for number in (0, 6, 7, 39, 13, 38):
        assert read_inside(url, f"row {number} audio") == cells[number]["bytes"]
    fill(tmp_path, {"x.parquet": parquet(table(cells[::-1]), rows=7)})
    assert read_inside(url, "row 0 audio") == cells[39]["bytes"]


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("row 3 audio", "run the ingest stage again"),
        ("row 0 nothing", "the table is damaged"),
        ("row 0 sentence", "holds no audio"),
        ("row -1 audio", "is no place in a container"),
        ("bytes 10 99999999", "run the ingest stage again"),
        ("bytes 10 9999999999999", "larger than 1024 MiB"),
        ("bytes 1e3 5", "is no place"),
        ("", "is no place"),
    ],
)
def test_places_that_are_not_there(tmp_path: Path, inside: str, expected: str) -> None:
    data = fill(tmp_path, {"x.parquet": parquet(table(CELLS))})
    with pytest.raises(BadAudio, match=expected):
        read_inside(f"{data}/x.parquet", inside)
    with pytest.raises(FileNotFoundError):
        read_inside(f"{data}/gone.parquet", "row 0 audio")


def test_hostile_tables_are_rejects(tmp_path: Path) -> None:
    good = stream(table(CELLS))
    files: dict[str, bytes | str] = {
        "packed.arrow": stream(table(CELLS), options=pa.ipc.IpcWriteOptions(compression="zstd")),
        "cut.arrow": good[:-600],
        "empty.arrow": b"",
        "text.arrow": "hello, this is no table at all",
        "cut.parquet": parquet(table(CELLS))[:-40],
        "empty.parquet": b"",
        "bomb.parquet": parquet(pa.table({"audio": pa.array([None] * 3_000_000, pa.string())}), rows=3_000_000),
        "dictionary.arrow": stream(pa.table({"audio": pa.array(["a", "b"]).dictionary_encode()})),
    }
    recordings, rejects = read_sources(fill(tmp_path, files))
    text = reasons(rejects)
    assert "packed.arrow: the table cannot be read: it is compressed" in text
    assert "cut.arrow: the table cannot be read: it breaks off" in text
    assert "text.arrow: the table cannot be read: this is no Arrow file" in text
    assert "bomb.parquet: the table cannot be read: it declares 3,000,000 rows" in text
    assert {reject.original for reject in rejects} >= set(files)
    assert ids(recordings) == ["a", "cut-000001"]  # of the first batch, before the cut


# ---- WebDataset -----------------------------------------------------------------------------------------------------


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar(*made: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for info, data in made:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset(tmp_path: Path, memory: Any, form: int, remote: bool) -> None:
    deep = "ä/" * 40 + "deep/" * 12 + "s3" if form != tarfile.USTAR_FORMAT else "deep/s3"
    made = tar(
        member("./a/", kind=tarfile.DIRTYPE),
        member("a/s1.wav", A),
        member("a/s1.json", json.dumps({"text": "one", "speaker": "ann", "labels": {"n": 3}}).encode()),
        member("s2.txt", b"two\n  words\n"),
        member("s2.cls", b"7"),
        member("s2.seg.flac", B),
        member("s2.jpg", b"\xff\xd8"),
        member(f"{deep}.WAV", C),
        member(".DS_Store", b"x"),
        form=form,
    )
    if remote:
        memory.pipe_file("/corpora/train/shard-000000.tar", made)
        data = "memory://corpora"
    else:
        data = fill(tmp_path, {"train/shard-000000.tar": made})
    recordings, rejects = read_sources(data)
    assert rejects == []
    assert ids(recordings) == ["a/s1", "s2", deep]
    assert [audio_of(r) for r in recordings] == [A, B, C]
    noted = [(n.text, n.speaker, n.labels, n.split) for n in (r.annotation for r in recordings)]
    assert noted == [
        ("one", "ann", {"n": 3}, "train"),
        ("two words", None, {"label": 7}, "train"),
        (None, None, {}, "train"),
    ]
    assert recordings[0].digest == digest_of(A) or remote
    assert len({r.digest for r in recordings}) == 3
    assert ids(read_sources(f"{data}/train/shard-000000.tar")[0]) == ids(recordings)


def test_hostile_tars_are_rejects(tmp_path: Path) -> None:
    made = tar(
        member("../up.wav", A),
        member("/etc/cron.d/root.wav", A),
        member("sub/../../up2.wav", A),
        member("link.wav", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("hard.wav", kind=tarfile.LNKTYPE, link="good.wav"),
        member("device.wav", kind=tarfile.CHRTYPE),
        member("pipe.wav", kind=tarfile.FIFOTYPE),
        member("good.wav", A),
        member("good.wav", B),
        member("noaudio.json", b"{}"),
        member("bomb.wav", A),
        member("bomb.json", b"[" * 100_000),
        member("deep.wav", A),
        member("deep.json", b'{"labels": ' + b'{"a":' * 40 + b"1" + b"}" * 41),
        member("huge.wav", A),
        member("huge.json", b" " * (2 << 20)),
        member("two.wav", A),
        member("two.flac", B),
        member("good.txt", b"again"),
        member("last.wav", C),
    )
    recordings, rejects = read_sources(fill(tmp_path / "in", {"x.tar": made}))
    assert ids(recordings) == ["good", "two", "last"]
    assert [audio_of(r) for r in recordings] == [A, A, C]
    text = reasons(rejects)
    for name, expected in {
        "../up.wav": "the name leads out of the tar",
        "/etc/cron.d/root.wav": "the name leads out of the tar",
        "sub/../../up2.wav": "the name leads out of the tar",
        "link.wav": "the member is a link",
        "hard.wav": "the member is a link",
        "device.wav": "a device or a pipe",
        "pipe.wav": "a device or a pipe",
        "good.wav": "a member of this name already",
        "noaudio": "the sample has no audio",
        "bomb": "its .json is not JSON",
        "deep": "more than 32 brackets",
        "huge.json": "larger than 1 MiB",
        "two.flac": "has audio in two.wav already",
        "good.txt": "samples of this name in two places",
    }.items():
        assert f"x.tar: {name}: " in text
        assert expected in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_broken_tars_keep_what_is_whole(tmp_path: Path) -> None:
    whole = tar(*(member(f"s{number}.wav", A) for number in range(3)))
    lying = bytearray(whole[:1024])
    lying[124:136] = b"77777777777\0"
    lying[148:156] = b" " * 8
    lying[148:156] = b"%06o\0 " % sum(lying[:512])
    cases: dict[str, tuple[bytes, list[str], str]] = {
        "cut": (whole[:9000], ["s0"], "is said to have 3,244 bytes, beyond its end, and its last sample s1"),
        "at a border": (whole[: 3 * 4096 + 512 - 512], ["s0", "s1"], "breaks off after 12,288 bytes"),
        "empty": (b"", [], "not a tar (it is too short)"),
        "gzip": (gzip.compress(whole), [], "the tar is packed with gzip: unpack that"),
        "text": (b"hello " * 200, [], "this is not a tar"),
        "damaged": (whole[:4196] + b"?" + whole[4197:], [], "the tar is damaged at byte 4,096"),
        "lying": (bytes(lying), [], "is said to have 8,589,934,591 bytes"),
    }
    for name, (data, expected, reason) in cases.items():
        recordings, rejects = read_sources(fill(tmp_path / name, {"x.tar": data}))
        assert ids(recordings) == expected, name
        assert reason in reasons(rejects), name
        assert len(rejects) == 1


# ---- bombs and noise ------------------------------------------------------------------------------------------------


def test_manifests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = '{"audio": "a.wav", "labels": ' + '{"a":' * 60 + "1" + "}" * 61
    text = "\n".join(['{"audio": "a.wav"}', '{"audio": "' + "x" * (3 << 20) + '"}', deep, '{"audio": "b.wav"}'])
    data = fill(tmp_path, {"manifest.jsonl": text, "a.wav": A, "b.wav": B})
    recordings, rejects = read_sources(data)
    assert ids(recordings) == ["a", "b"]
    assert "manifest.jsonl:2: the line is longer than 1 MiB" in reasons(rejects)
    assert "manifest.jsonl:3: the line is not JSON (more than 32 brackets" in reasons(rejects)
    monkeypatch.setattr(manifests, "MAX_MANIFEST", 5 << 20)
    monkeypatch.setattr(rows, "MAX_LISTED", 10)
    bomb = gzip.compress(b'{"audio": "a.wav"}\n' + b"{}\n" * 4000 + b" " * (30 << 20))
    recordings, rejects = read_sources(fill(tmp_path / "bomb", {"cuts.jsonl.gz": bomb, "a.wav": A}))
    assert ids(recordings) == ["a"]
    assert len(rejects) == 11
    assert "3,992 more of its rows are broken" in rejects[-1].reason
    half = gzip.compress(lines(*({"audio": "a.wav", "id": str(number)} for number in range(2000))).encode())
    recordings, rejects = read_sources(fill(tmp_path / "half", {"cuts.jsonl.gz": half[: len(half) // 2], "a.wav": A}))
    assert 0 < len(recordings) < 2000
    assert "the compressed data are damaged" in reasons(rejects)
    monkeypatch.setattr(manifests, "MAX_OBJECTS", 5)
    many = json.dumps([{"audio": "a.wav"}] * 6)
    assert "too large; write one object a line" in next(iter(manifests.read_rows(many.encode(), "x.json"))).fault


def harmless(folder: Path, name: str, content: bytes) -> None:
    """The same files beside it are read or set aside, without an exception."""
    (folder / name).write_bytes(content)
    try:
        recordings, rejects = read_sources(str(folder))
    except ValueError as error:
        if "nothing to read" not in str(error):
            raise
        return
    reasons(rejects)
    for recording in recordings:
        recording.model_dump_json().encode()
        assert storage.local_path(recording.url).resolve().is_relative_to(folder.resolve())
        with contextlib.suppress(BadAudio):
            audio_of(recording)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
FIELDS = "id offset duration start labels supervisions custom recording sources type channel split translation"
NAMES = st.sampled_from(
    [*rows.TEXT_FIELDS, *manifests.AUDIO_FIELDS, *FIELDS.split(), "conversations", "speaker", "source", "tracks"]
)
VALUES = (
    JSON
    | st.sampled_from(["a.wav", "MonoCut", "file", "../a.wav", "/etc/hostname", 0.05])
    | st.just([cut("y", "a.wav")])
)
ROWS = st.dictionaries(NAMES, VALUES, max_size=6)
CUTS = ROWS.map(lambda fields: cut("x", "a.wav") | fields)


@FUZZ
@given(
    data=st.lists(ROWS | CUTS | JSON, max_size=4),
    name=st.sampled_from(["manifest.jsonl", "cuts.jsonl", "manifest.json"]),
)
def test_any_json_is_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, data: list[Any], name: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.wav").write_bytes(C)
    harmless(folder, name, json.dumps(data).encode() if name.endswith("n") else lines(*data).encode())


@FUZZ
@given(
    data=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    name=st.sampled_from(["manifest.csv", "manifest.tsv", "manifest.jsonl", "wav.scp", "segments", "text", "utt2spk"]),
)
def test_any_bytes_are_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    fill(folder, {"a.wav": C, **({} if name.startswith("manifest") else {"wav.scp": "u a.wav\n"})})
    harmless(folder, name, b"audio,text\na.wav,x\n" * name.endswith("csv") + data)


TAR = tar(member("s1.wav", C), member("s1.json", b'{"text": "x"}'), member("ä" * 80 + "/s2.wav", C))
WHOLE = {
    "x.tar": TAR,
    "x.arrow": stream(table([{"bytes": b"RIFF" * 8, "path": "a.wav"}] * 3)),
    "x.parquet": parquet(table([{"bytes": b"RIFF" * 8, "path": "a.wav"}] * 3)),
    "cuts.jsonl.gz": gzip.compress(lines(*(cut(str(number), "a.wav") for number in range(9))).encode()),
}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and bytes of a container of which some bytes are others, or the end is missing."""
    name = draw(st.sampled_from(sorted(WHOLE)))
    data = bytearray(WHOLE[name])
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return name, bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])


@FUZZ
@given(container=damaged())
def test_damaged_containers_are_read_or_set_aside(
    tmp_path_factory: pytest.TempPathFactory, container: tuple[str, bytes]
) -> None:
    harmless(Path(fill(tmp_path_factory.mktemp("fuzz"), {"a.wav": C})), *container)


@pytest.mark.slow
@LONG_FUZZ
@given(container=damaged())
def test_many_damaged_containers(tmp_path_factory: pytest.TempPathFactory, container: tuple[str, bytes]) -> None:
    harmless(Path(fill(tmp_path_factory.mktemp("fuzz"), {"a.wav": C})), *container)
