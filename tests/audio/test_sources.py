"""Every form of a data folder, and every way in which one can be broken, ends in recordings and reasons."""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile as sf

from components.audio.decode import BadAudio, decode
from components.audio.identity import digest_at
from components.audio.sources import read_sources
from components.schema import Recording, Reject
from infra import storage


def tone(pitch: float = 200.0) -> bytes:
    buffer = io.BytesIO()
    samples = 0.3 * np.sin(2 * np.pi * pitch * np.arange(1600) / 16_000)
    sf.write(buffer, samples, 16_000, format="WAV")
    return buffer.getvalue()


WAV = tone()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: Mapping[str, object] | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def ids(recordings: list[Recording]) -> list[str]:
    return [recording.annotation.id for recording in recordings]


def reasons(rejects: list[Reject]) -> dict[str, str]:
    return {reject.original: reject.reason for reject in rejects}


def test_jsonl_with_every_field(tmp_path: Path) -> None:
    row: dict[str, object] = {
        "id": "a1",
        "audio": "audio/a.wav",
        "duration": 0.1,
        "text": "an apple",
        "pseudo_text": "a napple",
        "language": "en",
        "speaker": 7,
        "gender": "F",
        "split": "validation",
        "labels": {"digit": 0, "age": 31.5, "slots": {"size": "big"}, "loud": True},
        "translation": {"fr": "une pomme"},
        "caption": "Someone says apple.",
        "source": "our kitchen",
        "licence": "CC0-1.0",
        "conversations": [{"role": "user", "content": [{"type": "audio"}]}],
        "dataset": "fruit",
    }
    fill(tmp_path, {"manifest.jsonl": lines(row), "audio/a.wav": WAV, "audio/not_in_the_manifest.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert rejects == []
    (recording,) = recordings
    noted = recording.annotation
    assert noted.model_dump() == {
        "id": "a1",
        "text": "an apple",
        "language": "en",
        "speaker": "7",
        "gender": "female",
        "split": "dev",
        "labels": {"digit": 0, "age": 31.5, "slots": {"size": "big"}, "loud": True},
        "translation": {"fr": "une pomme"},
        "caption": "Someone says apple.",
        "source": "our kitchen",
        "licence": "CC0-1.0",
        "conversations": [{"role": "user", "content": [{"type": "audio"}]}],
    }
    assert type(noted.labels["digit"]) is int
    assert recording.digest == digest_at(recording.url)
    assert decode(storage.read_bytes(recording.url), "a").samples.shape == (1600,)


@pytest.mark.parametrize("field", ["audio", "audio_filepath", "file_name", "file", "path", "wav"])
@pytest.mark.parametrize("text_field", ["text", "sentence", "transcript", "transcription"])
def test_names_of_the_audio_and_text_fields(tmp_path: Path, field: str, text_field: str) -> None:
    fill(tmp_path, {"manifest.jsonl": lines({field: "x.wav", text_field: "hello"}), "x.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert [(item.annotation.id, item.annotation.text) for item in recordings] == [("x", "hello")]
    assert rejects == []


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "semicolon", "metadata.csv", "metadata.jsonl"])
def test_every_manifest_says_the_same(tmp_path: Path, form: str, mark: str, newline: str) -> None:
    rows = [("b.wav", 'she said "hé", and left', "x"), ("ä c.wav", "zwei; drei", "y")]
    quoted = [(name, '"' + text.replace('"', '""') + '"', who) for name, text, who in rows]
    dicts = [{"file_name": name, "text": text, "speaker_id": who} for name, text, who in rows]
    header = ("File_Name", " text", "speaker_id")
    name, content = {
        "jsonl": ("manifest.jsonl", lines(*dicts)),
        "json": ("manifest.json", json.dumps(dicts)),
        "csv": ("manifest.csv", "\n".join(",".join(row) for row in [header, *quoted])),
        "tsv": ("manifest.tsv", "\n".join("\t".join(row) for row in [header, *rows]) + "\n"),
        "semicolon": ("manifest.csv", "\n".join(";".join(row) for row in [header, *quoted])),
        "metadata.csv": ("metadata.csv", "\n".join(",".join(row) for row in [header, *quoted]) + "\n\n"),
        "metadata.jsonl": ("metadata.jsonl", lines(*dicts)),
    }[form]
    fill(tmp_path, {name: mark + content.replace("\n", newline), "b.wav": WAV, "ä c.wav": tone(300)})
    recordings, rejects = read_sources(str(tmp_path))
    assert rejects == []
    got = [(item.annotation.id, item.annotation.text, item.annotation.speaker) for item in recordings]
    assert got == [("b", 'she said "hé", and left', "x"), ("ä c", "zwei; drei", "y")]


def test_tables_keep_numbers_and_objects(tmp_path: Path) -> None:
    header = "path\tlabels.age\tlabels.code\ttranslation.en\ttranslation\tlabels\n"
    cells = 'x.wav\t31\t007\tapple\t{"fr": "pomme"}\t{"digit": 3}\n'
    fill(tmp_path, {"manifest.tsv": header + cells, "x.wav": WAV})
    (recording,), _ = read_sources(str(tmp_path))
    assert recording.annotation.labels == {"digit": 3, "age": 31, "code": "007"}
    assert recording.annotation.translation == {"fr": "pomme", "en": "apple"}


def test_common_voice_quotes_are_letters(tmp_path: Path) -> None:
    table = 'path\tsentence\na.wav\t"Open only\nb.wav\t"Both," he said.\nc.wav\t"wrapped ""twice"""\n'
    fill(tmp_path, {"manifest.tsv": table, "a.wav": WAV, "b.wav": WAV, "c.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert rejects == []
    assert [item.annotation.text for item in recordings] == ['"Open only', '"Both," he said.', 'wrapped "twice"']


def test_a_broken_csv_row_costs_only_itself(tmp_path: Path) -> None:
    table = 'audio,text\na.wav,"never closed\nb.wav,fine\nc.wav,one,comma,too,many\nd.wav\n'
    fill(tmp_path, {"manifest.csv": table, **{f"{name}.wav": WAV for name in "abcd"}})
    recordings, rejects = read_sources(str(tmp_path))
    assert ids(recordings) == ["b", "d"]
    assert recordings[1].annotation.text is None
    assert [reject.original for reject in rejects] == ["manifest.csv:2", "manifest.csv:4"]
    assert "5 cells under 2 columns" in rejects[1].reason


def test_a_table_without_an_audio_column_is_one_reject(tmp_path: Path) -> None:
    fill(tmp_path, {"a/metadata.csv": "name,text\n" + "x,y\n" * 50, "b/metadata.csv": "path\nx.wav\n", "b/x.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert ids(recordings) == ["b/x"]
    assert len(rejects) == 1
    assert rejects[0].original == "a/metadata.csv:1"
    assert "no column is named audio or audio_filepath" in rejects[0].reason


def test_text_beside_audio_and_bare_audio(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "b.wav": WAV,
        "b.txt": "\ufeffa  line\r\nand another\r\n",
        "a/deep folder/ünï #1.FLAC": WAV,
        "a/latin.wav": WAV,
        "a/latin.txt": "é".encode("latin-1"),
        "README.txt": "not a transcript",
        ".hidden.wav": WAV,
        "__MACOSX/b.wav": WAV,
        "notes.pdf": b"%PDF",
    }
    recordings, rejects = read_sources(str(fill(tmp_path, files)))
    assert [(item.annotation.id, item.annotation.text) for item in recordings] == [
        ("a/deep folder/ünï #1", None),
        ("b", "a line and another"),
    ]
    assert reasons(rejects) == {"a/latin.wav": "its text a/latin.txt is not UTF-8; save it as UTF-8"}
    assert storage.read_bytes(recordings[0].url) == WAV


def test_sub_folders_are_joined_and_the_topmost_manifest_speaks(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "one/manifest.jsonl": lines({"id": "0001", "audio": "w.wav"}),
        "one/w.wav": WAV,
        "one/inner/manifest.jsonl": lines({"id": "inner", "audio": "v.wav"}),
        "one/inner/v.wav": WAV,
        "two/train/metadata.csv": "file_name,text\ny.wav,hello\n",
        "two/train/y.wav": WAV,
        "two/test/metadata.csv": "file_name,text\ny.wav,bye\n",
        "two/test/y.wav": WAV,
        "three/manifest.jsonl": lines({"id": "0001", "audio": "w.wav"}),
        "three/w.wav": WAV,
        "bare/z.wav": WAV,
        "lake/audio/set/v1/manifest.json": json.dumps({"schema_version": 1, "kind": "audio", "shards": []}),
    }
    recordings, rejects = read_sources(str(fill(tmp_path, files)))
    assert rejects == []
    assert ids(recordings) == ["0001", "three/0001", "two/test/y", "two/train/y", "bare/z"]
    assert [item.annotation.split for item in recordings] == [None, None, "test", "train", None]


def test_bad_files_beside_good_ones(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "good/manifest.jsonl": lines({"id": "g", "audio": "g.wav", "text": "good"}),
        "good/g.wav": WAV,
        "bad/manifest.jsonl": lines(
            {"file": "zero_byte.wav", "bytes": 0, "what": "empty", "expected": "clear error"},
            {"file": "page.flac", "what": "a failed download", "expected": "clear error"},
            {"file": "gone.wav", "what": "not there", "expected": "clear error"},
        ),
        "bad/zero_byte.wav": b"",
        "bad/page.flac": "<html>404</html>",
    }
    recordings, rejects = read_sources(str(fill(tmp_path, files)))
    assert ids(recordings) == ["bad/zero_byte", "bad/page", "g"]
    assert reasons(rejects) == {
        "bad/gone.wav": "the file is missing; copy it there or remove its row (bad/manifest.jsonl:3)"
    }
    for recording in recordings[:2]:
        with pytest.raises(BadAudio):
            decode(storage.read_bytes(recording.url), recording.annotation.id)


def test_the_bad_folder_is_a_data_folder(shared_data: Path, tmp_path: Path) -> None:
    recordings, rejects = read_sources(str(shared_data / "bad"))
    assert rejects == []
    assert len(recordings) == 31
    assert ids(recordings)[:2] == ["truncated", "zero_byte"]
    assert "name with spaces and ünïcode" in ids(recordings)
    shutil.copytree(shared_data / "bad", tmp_path / "mixed")
    (tmp_path / "mixed" / "manifest.jsonl").unlink()
    (tmp_path / "mixed" / "silent.txt").write_text("")
    bare, _ = read_sources(str(tmp_path / "mixed"))
    assert len(bare) == 31
    assert next(item.annotation.text for item in bare if item.annotation.id == "silent") == ""


@pytest.mark.slow
def test_all_the_real_data_at_once(shared_data: Path) -> None:
    recordings, rejects = read_sources(str(shared_data))
    assert rejects == []
    assert len(recordings) == 4881 + 31
    assert len(set(ids(recordings))) == len(recordings)
    digit = next(item.annotation.labels["digit"] for item in recordings if item.annotation.id == "0_jackson_0")
    assert (digit, type(digit)) == (0, int)
    assert {item.annotation.licence for item in recordings if "/fsdd/" in item.url} == {"CC-BY-SA-4.0"}


BROKEN: dict[str, tuple[dict[str, object] | str, str]] = {
    "cut line": ('{"audio": "x.wav", "te', "the line is not JSON"),
    "nan": ('{"audio": "x.wav", "labels": {"a": NaN}}', "NaN is not JSON"),
    "deep": ("[" * 100_000, "the line is not JSON"),
    "list": ('["x.wav"]', "not an object with fields"),
    "no audio": ({"text": "hello"}, "the row has no audio field"),
    "empty audio": ({"audio": " "}, "the row has no audio field"),
    "number for audio": ({"audio": 5}, "the row has no audio field"),
    "missing": ({"audio": "nowhere.wav"}, "the file is missing"),
    "folder": ({"audio": "sub"}, "the file cannot be opened"),
    "file as folder": ({"audio": "x.wav/y.wav"}, "the file is missing"),
    "up": ({"audio": "../x.wav"}, "leads out of the data folder"),
    "up in the middle": ({"audio": "sub/../../x.wav"}, "leads out of the data folder"),
    "up on Windows": ({"audio": "..\\x.wav"}, "leads out of the data folder"),
    "only up": ({"audio": ".."}, "leads out of the data folder"),
    "root": ({"audio": "/etc/hostname"}, "leads out of the data folder"),
    "drive": ({"audio": "C:\\x.wav"}, "leads out of the data folder"),
    "url": ({"audio": "s3://bucket/x.wav"}, "leads out of the data folder"),
    "file url": ({"audio": "file:///etc/hostname"}, "leads out of the data folder"),
    "null byte": ({"audio": "x\0.wav"}, "no file name can hold"),
    "half a character": ('{"audio": "x.wav", "text": "\\ud800"}', "lone surrogate"),
    "half a character in a label": ('{"audio": "x.wav", "labels": {"a": "\\ud800"}}', "cannot be written as UTF-8"),
    "half a character in the name": ('{"audio": "\\ud800.wav"}', "no file name can hold"),
    "very long name": ({"audio": "x" * 5000 + ".wav"}, "cannot be opened"),
    "split": ({"audio": "x.wav", "split": "other"}, "is not train, dev or test"),
    "translation": ({"audio": "x.wav", "translation": "pomme"}, "must name languages"),
    "conversations": ({"audio": "x.wav", "conversations": "hello"}, "list of chat messages"),
    "text": ({"audio": "x.wav", "text": ["a"]}, "the field text is a JSON list"),
    "part": ({"audio": "x.wav", "offset": -1.5, "duration": 2}, "is not a number of seconds from 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_set_aside_and_the_rest_goes_on(tmp_path: Path, case: str) -> None:
    row, expected = BROKEN[case]
    before, after = {"audio": "x.wav", "id": "before"}, {"audio": "x.wav", "id": "after"}
    fill(tmp_path, {"in/manifest.jsonl": lines(before, row, after), "in/x.wav": WAV, "in/sub/y.wav": WAV, "x.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path / "in"))
    assert ids(recordings) == ["before", "after"]
    assert len(rejects) == 1
    assert expected in rejects[0].reason
    assert ";" in rejects[0].reason or "must" in rejects[0].reason or "names" in rejects[0].reason
    rejects[0].model_dump_json().encode()
    assert rejects[0].id


def test_lines_in_another_encoding(tmp_path: Path) -> None:
    latin = '{"audio": "x.wav", "text": "é"}\n'.encode("latin-1")
    fill(tmp_path, {"manifest.jsonl": latin + b'{"audio": "x.wav"}\n\n', "x.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert ids(recordings) == ["x"]
    assert "not UTF-8" in rejects[0].reason
    (tmp_path / "manifest.jsonl").write_bytes('{"audio": "x.wav", "text": "é"}\n'.encode("utf-16"))
    assert read_sources(str(tmp_path))[0][0].annotation.text == "é"


def test_paths_as_people_write_them(tmp_path: Path) -> None:
    composed, apart = unicodedata.normalize("NFC", "é.wav"), unicodedata.normalize("NFD", "é.wav")
    fill(tmp_path, {"in/sub/x.wav": WAV, f"in/{composed}": WAV, "in/100% #1 [x]*.wav": WAV})
    rows = ["./sub/x.wav", "sub/../sub/x.wav", "sub\\x.wav", str(tmp_path / "in/sub/x.wav"), apart, "100% #1 [x]*.wav"]
    (tmp_path / "in/manifest.jsonl").write_text(
        lines(*({"audio": path, "id": f"r{number}"} for number, path in enumerate(rows)))
    )
    recordings, rejects = read_sources(str(tmp_path / "in"))
    assert rejects == []
    assert len({item.url for item in recordings[:4]}) == 1
    assert all(storage.read_bytes(item.url) == WAV for item in recordings)


def test_repeated_rows_and_ids(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"audio": "x.wav", "text": "a"},
        {"audio": "x.wav", "text": "a"},
        {"audio": "x.wav", "text": "b"},
        {"audio": "sub/y.wav", "id": "x"},
        {"audio": "sub/z.wav", "id": "x"},
    ]
    fill(tmp_path, {"manifest.jsonl": lines(*rows), "x.wav": WAV, "sub/y.wav": WAV, "sub/z.wav": WAV})
    recordings, rejects = read_sources(str(tmp_path))
    assert ids(recordings) == ["x", "x-2", "sub/x", "sub/x-2"]
    assert [reject.reason for reject in rejects] == ["the row repeats an earlier one; remove it"]


def test_a_manifest_or_one_file_given_by_name(tmp_path: Path) -> None:
    fill(tmp_path, {"train.tsv": "path\tsentence\nclips/x.wav\thello\n", "clips/x.wav": WAV})
    for name, expected in (("train.tsv", "clips/x"), ("clips/x.wav", "x")):
        recordings, rejects = read_sources(str(tmp_path / name))
        assert ids(recordings) == [expected]
        assert rejects == []
        assert storage.read_bytes(recordings[0].url) == WAV


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"data/manifest.jsonl": lines({"audio": "data/x.wav"}), "data/data/x.wav": WAV})
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "./data", "data/"):
        recordings, rejects = read_sources(folder)
        assert ids(recordings) == ["data/x"]
        assert rejects == []


def test_nothing_to_read_names_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "missing.jsonl"):
        with pytest.raises(ValueError, match=r"looked for manifest\.jsonl.*\.wav.*check the path"):
            read_sources(str(folder))


def test_only_broken_rows_are_reasons_and_no_error(tmp_path: Path) -> None:
    fill(tmp_path, {"manifest.jsonl": "not json\n"})
    recordings, rejects = read_sources(str(tmp_path))
    assert recordings == []
    assert [reject.original for reject in rejects] == ["manifest.jsonl:1"]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        (tmp_path / "caf\udce9.wav").write_bytes(WAV)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system holds UTF-8 names only")
    (tmp_path / "x.wav").write_bytes(WAV)
    recordings, rejects = read_sources(str(tmp_path))
    assert ids(recordings) == ["x"]
    assert [reject.reason for reject in rejects] == ["the name is not UTF-8; rename the file"]


def test_a_folder_in_memory_reads_as_one_on_disk(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "one/manifest.jsonl": lines(
            {"audio": "ä b.wav", "text": "hé", "labels": {"n": 3}},
            {"audio": "gone.wav"},
            {"audio": "../../x.wav"},
            {"audio": "memory://sources/one/ä b.wav", "id": "in full"},
        ),
        "one/ä b.wav": WAV,
        "two/y.wav": tone(300),
        "two/y.txt": "why",
    }
    memory = fsspec.filesystem("memory")
    for name, content in files.items():
        memory.pipe_file(f"/sources/{name}", content.encode() if isinstance(content, str) else content)
    try:
        recordings, rejects = read_sources("memory://sources")
        assert ids(recordings) == ["one/ä b", "in full", "two/y"]
        assert [item.annotation.text for item in recordings] == ["hé", None, "why"]
        assert len({item.digest for item in recordings}) == 2
        assert sorted(reasons(rejects)) == ["../../x.wav", "one/gone.wav"]
        assert all(decode(storage.read_bytes(item.url), item.url).marks == () for item in recordings)
        by_name, _ = read_sources("memory://sources/one/manifest.jsonl")
        assert ids(by_name) == ["ä b", "in full"]
    finally:
        memory.rm("/sources", recursive=True)
    local, _ = read_sources(str(fill(tmp_path, files)))
    assert ids(local) == ["one/ä b", "two/y"]
