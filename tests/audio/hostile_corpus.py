"""A data folder with everything in it that is meant to hurt, and of each thing what must become of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf

SECONDS = 0.2


class Corpus:
    """Files below `root`, how many clips each must give, and the rejects that must be listed: name and phrase."""

    def __init__(self, root: Path, outside: Path, large: bool) -> None:
        self.root, self.outside, self.large = root, outside, large
        self.kept: Counter[str] = Counter()
        self.rejects: list[tuple[str, str]] = []
        self.pitch = 100.0

    def tone(self, form: str = "WAV", seconds: float = SECONDS, **how: str) -> bytes:
        """A sound that no other file has."""
        self.pitch += 7.0
        time = np.arange(round(seconds * 16_000)) / 16_000
        buffer = io.BytesIO()
        sf.write(buffer, 0.3 * np.sin(2 * np.pi * self.pitch * time), 16_000, format=form, **how)
        return buffer.getvalue()

    def put(self, name: str, data: bytes | str) -> None:
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)

    def good(self, name: str, data: bytes | None = None) -> None:
        self.put(name, data or self.tone())
        self.kept[name] += 1

    def bad(self, name: str, data: bytes | str, phrase: str) -> None:
        self.put(name, data)
        self.rejects.append((name, phrase))


def build(root: Path, outside: Path, bad_folder: Path | None, large: bool) -> Corpus:
    """`outside` holds secret.wav, secret.txt and folder/more.wav, none of which may be read; `large` adds bombs."""
    corpus = Corpus(root, outside, large)
    for number in range(3):
        corpus.good(f"good/clip{number}.flac", corpus.tone("FLAC"))
    for part in (headers, names, tars, rows, corpora, tables, links):
        part(corpus)
    if large:
        bombs(corpus)
    if bad_folder is not None:
        shutil.copytree(bad_folder, root / "bad")
        (root / "bad/manifest.jsonl").unlink()  # of names and what they are; without it each file stands for itself
    return corpus


# ---- audio ----------------------------------------------------------------------------------------------------------


def _set(data: bytes, place: bytes, offset: int, code: str, *values: float | bytes) -> bytes:
    changed = bytearray(data)
    struct.pack_into(code, changed, data.index(place) + offset, *values)
    return bytes(changed)


def _frames(flac: bytes, frames: int) -> bytes:
    return flac[:18] + (int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames).to_bytes(8, "big") + flac[26:]


def headers(corpus: Corpus) -> None:
    """Sizes, rates and channels that no recording has, in the header of 0.2 s of audio."""
    wav, flac, rf64, w64, aiff, au, nist = (
        corpus.tone(form) for form in ("WAV", "FLAC", "RF64", "W64", "AIFF", "AU", "NIST")
    )
    cut, unread = "of what the header declares are missing", "the decoder cannot read it"
    cases: list[tuple[str, bytes, str | None]] = [
        ("data-1e9.wav", _set(wav, b"data", 4, "<I", 10**9), cut),
        ("data-2e31.wav", _set(wav, b"data", 4, "<I", 2**31), None),  # never filled in: read as far as it goes
        ("data-max.wav", _set(wav, b"data", 4, "<I", 2**32 - 1), None),
        ("channels-65535.wav", _set(wav, b"fmt ", 10, "<H", 65535), unread),
        ("channels-1024.wav", _set(wav, b"fmt ", 10, "<H", 1024), "1024 channels, at most 32"),
        ("channels-0.wav", _set(wav, b"fmt ", 10, "<H", 0), "declares 0 channels"),
        ("rate-0.wav", _set(wav, b"fmt ", 12, "<I", 0), "a sample rate of 0 Hz"),
        ("rate-1.wav", _set(wav, b"fmt ", 12, "<I", 1), "a sample rate of 1 Hz is outside"),
        ("rate-2e31.wav", _set(wav, b"fmt ", 12, "<I", 2**31), unread),
        ("fmt-4GB.wav", _set(wav, b"fmt ", 4, "<I", 2**32 - 1), unread),
        ("frames-1e9.flac", _frames(flac, 10**9), "minutes are too many for one clip"),
        ("frames-2e36.flac", _frames(flac, 2**36 - 1), "minutes are too many for one clip"),
        ("samples-1e9.rf64.wav", _set(rf64, b"ds64", 8, "<QQQ", *[10**9] * 3), cut),
        ("samples-2e63.rf64.wav", _set(rf64, b"ds64", 8, "<QQQ", *[2**63 - 1] * 3), None),
        ("samples-2e64.rf64.wav", _set(rf64, b"ds64", 8, "<QQQ", *[2**64 - 1] * 3), unread),
        ("data-1e9.w64.wav", _set(w64, b"data", 16, "<Q", 10**9), cut),
        ("data-2e63.w64.wav", _set(w64, b"data", 16, "<Q", 2**63 - 1), unread),
        ("sound-5e8.aiff", _set(aiff, b"SSND", 4, ">I", 5 * 10**8), cut),
        ("sound-max.aiff", _set(aiff, b"SSND", 4, ">I", 2**32 - 1), None),
        ("half.aiff", aiff[: len(aiff) // 2], cut),
        ("channels-65535.aiff", _set(aiff, b"COMM", 8, ">H", 65535), unread),
        ("rate-nan.aiff", _set(aiff, b"COMM", 16, ">10s", b"\x7f" + b"\xff" * 9), "a sample rate of"),
        ("half.au", au[: len(au) // 2], cut),
        ("channels-65535.au", _set(au, b".snd", 20, ">I", 65535), unread),
        ("half.sph", nist[: len(nist) // 2], cut),
        ("frames-2e63.caf", _caf(corpus, 2**63 - 1), cut),
        ("rate-inf.caf", _set(_caf(corpus), b"desc", 12, ">d", float("inf")), "a sample rate of"),
        ("tag-256MB.mp3", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + corpus.tone("MP3"), "not recognised as audio"),
        ("pages.ogg", b"OggS" * 5000, "; "),
    ]
    for name, data, phrase in cases:
        corpus.good(f"headers/{name}", data) if phrase is None else corpus.bad(f"headers/{name}", data, phrase)


def _caf(corpus: Corpus, size: int | None = None) -> bytes:
    """Core Audio Format by hand: https://developer.apple.com/library/archive/documentation/MusicAudio (CAF 1.0)."""
    sound = corpus.tone()[44:]
    form = struct.pack(">d4sIIIII", 16_000.0, b"lpcm", 2, 2, 1, 1, 16)
    head = b"caff\0\1\0\0desc" + struct.pack(">q", len(form)) + form
    return head + b"data" + struct.pack(">qI", len(sound) + 4 if size is None else size, 0) + sound


def names(corpus: Corpus) -> None:
    """Good clips under every name that a file system allows."""
    twins = [unicodedata.normalize(form, "é twin") for form in ("NFC", "NFD")]
    for name in [
        *(
            "سلام عليكم",
            "नमस्ते",
            "🎧🦊",
            "한국어",
            "שלום",
            *twins,
            "line\nfeed",
            'it\'s "quoted"',
            "-rf",
            " space ",
            "CON",
        ),
        *(
            "x" * 251,
            "[/bold]",
            "<img src=x onerror=alert(1)>",
            "\x1b[2J",
            "a\\..\\..\\b",
            "%2e%2e%2fx",
            "\u202egpj",
            "$HOME",
        ),
        *("cut", "cut--0001", "cut--00012", "*", "?", "a;b", "{}", "%s%n", "‮"),
    ]:
        corpus.good(f"names/{name}.wav")
    corpus.put("names/caf\udce9.wav", corpus.tone())
    corpus.put("names/caf\udce9.tar", _tar(corpus, [("a.wav", tarfile.REGTYPE, "")]))
    corpus.put("caf\udce9/manifest.jsonl", '{"audio": "a.wav"}\n')
    for name in ("names/caf?.wav", "names/caf?.tar", "caf?/manifest.jsonl"):
        corpus.rejects.append((name, "the name is not UTF-8"))


# ---- tars -----------------------------------------------------------------------------------------------------------


def _tar(corpus: Corpus, made: list[tuple[str, bytes, str]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, kind, link in made:
            info = tarfile.TarInfo(name)
            data = corpus.tone() if kind == tarfile.REGTYPE else b""
            info.size, info.type, info.linkname = len(data), kind, link
            info.devmajor, info.devminor = 1, 5
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tars(corpus: Corpus) -> None:
    out, link, device = "leads out of the tar", "the member is a link", "a device or a pipe"
    made = [
        ("../up.wav", tarfile.REGTYPE, "", out),
        ("sub/../../up2.wav", tarfile.REGTYPE, "", out),
        ("/etc/cron.d/root.wav", tarfile.REGTYPE, "", out),
        ("C:\\windows\\x.wav", tarfile.REGTYPE, "", out),
        ("..\\up3.wav", tarfile.REGTYPE, "", out),
        ("soft.wav", tarfile.SYMTYPE, str(corpus.outside / "secret.wav"), link),
        ("hard.wav", tarfile.LNKTYPE, "/etc/passwd", link),
        ("character.wav", tarfile.CHRTYPE, "", device),
        ("block.wav", tarfile.BLKTYPE, "", device),
        ("pipe.wav", tarfile.FIFOTYPE, "", device),
        ("twice.wav", tarfile.REGTYPE, "", None),
        ("twice.wav", tarfile.REGTYPE, "", "has a member of this name already"),
        ("日本語/नमस्ते.wav", tarfile.REGTYPE, "", None),
        ("n\nl.wav", tarfile.REGTYPE, "", None),
        ("twice.flac", tarfile.REGTYPE, "", "samples of this name in two places"),
    ]
    corpus.put("tars/x.tar", _tar(corpus, [(name, kind, to) for name, kind, to, _ in made]))
    for name, _, _, phrase in made:
        if phrase is None:
            corpus.kept["tars/x.tar"] += 1
        else:
            corpus.rejects.append((f"tars/x.tar: {name}", phrase))
    count = 20_000 if corpus.large else 300
    corpus.put("tars/many.tar", _tar(corpus, [(f"a.{number}.wav", tarfile.SYMTYPE, "b") for number in range(count)]))
    corpus.rejects += [(f"tars/many.tar: a.{number}.wav", link) for number in range(count)]
    empty = tarfile.TarInfo("x.wav")
    empty.size = 2**63 - 1
    corpus.bad("tars/size.tar", empty.tobuf(tarfile.GNU_FORMAT), "is said to have 9,223,372,036,854,775,807 bytes")
    corpus.bad("tars/packed.tar", gzip.compress(bytes(1 << 20)), "packed with gzip")
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    corpus.put("tars/longname.tar", long.tobuf(tarfile.GNU_FORMAT))
    with open(corpus.root / "tars/longname.tar", "r+b") as file:
        file.truncate((1 << 30) + 4096)  # of holes
    corpus.rejects.append(("tars/longname.tar", "a header of the tar has 1,073,741,824 bytes"))


# ---- manifests ------------------------------------------------------------------------------------------------------


def rows(corpus: Corpus) -> None:
    """JSON lines, JSON and CSV."""
    corpus.put("json/x.wav", corpus.tone())
    huge, deep = "1" + "0" * 400, 100_000
    out, unread = "leads out of the data folder", "the line is not JSON"
    made: list[tuple[str, str | None, str]] = [  # a line, its phrase, and the path that it names
        ('{"audio": "x.wav", "id": "first"}', None, ""),
        ("[" * deep + "]" * deep, unread, ""),
        ('{"audio": "x.wav", "labels": ' + '{"a":' * deep + "1" + "}" * (deep + 1), unread, ""),
        ('{"audio": "x.wav", "id": ' + huge + ', "labels": {"n": ' + huge + "}}", None, ""),
        ('{"audio": "x.wav", "offset": ' + huge + "}", "is not a number of seconds", "json/x.wav"),
        ('{"audio": "x.wav", "labels": {"n": 1' + "0" * 5000 + "}}", unread, ""),
        ('{"audio": "x.wav", "labels": {"n": 1e999}}', "cannot be written as UTF-8 JSON", "json/x.wav"),
        ('{"audio": "x.wav", "labels": {"n": NaN}}', "NaN is not JSON", ""),
        ('{"audio": "x.wav", "text": "\\ud800"}', "half a character", "json/x.wav"),
        ('{"audio": "x.wav", "audio": "../../x.wav"}', out, "../../x.wav"),
        ('{"audio": "x\\u0000.wav"}', "no file name can hold", "x\0.wav"),
        ('{"audio": "../../secret.wav"}', out, "../../secret.wav"),
        ('{"audio": "/etc/passwd"}', out, "/etc/passwd"),
        ('{"audio": "file:///etc/passwd"}', out, "file:///etc/passwd"),
        ('{"audio": "http://169.254.169.254/latest/x.wav"}', out, "http://169.254.169.254/latest/x.wav"),
        ('{"audio": "../links/out/more.wav"}', "a link that leads out", "links/out/more.wav"),
        ('{"audio": "' + "y" * ((50 if corpus.large else 2) << 20) + '"}', "longer than 1 MiB", ""),
        ('{"audio": "x.wav", "id": "last", "text": "</script><script>alert(1)</script>"}', None, ""),
    ]
    corpus.put("json/manifest.jsonl", "\n".join(line for line, _, _ in made))
    for number, (_, phrase, path) in enumerate(made, start=1):
        if phrase is None:
            corpus.kept["json/x.wav"] += 1
        else:
            corpus.rejects.append((path or f"json/manifest.jsonl:{number}", phrase))
    corpus.bad("deep/manifest.json", '[{"a":' * deep, "")
    corpus.rejects[-1] = ("deep/manifest.json:1", unread)
    corpus.put("csv/x.wav", corpus.tone())
    swallow = 'b","\n' * (200_000 if corpus.large else 20_000)  # each line opens what the next one closes and opens
    corpus.put("csv/manifest.csv", "audio,text\nx.wav,good\n../../y.wav,up\n" + swallow)
    corpus.kept["csv/x.wav"] += 1
    corpus.rejects.append(("../../y.wav", out))


def corpora(corpus: Corpus) -> None:
    """NeMo, Lhotse and Kaldi that point elsewhere."""
    secret = str(corpus.outside / "secret.wav")
    for folder in ("nemo", "lhotse", "kaldi"):
        corpus.good(f"{folder}/x.wav")
    nemo = [{"audio_filepath": name, "duration": SECONDS} for name in ("x.wav", secret, "../../outside/secret.wav")]
    corpus.put("nemo/train_manifest.json", "\n".join(map(json.dumps, nemo)))
    corpus.rejects += [(name, "leads out of the data folder") for name in (secret, "../../outside/secret.wav")]
    cuts = []
    for kind, source in (("file", "x.wav"), ("file", secret), ("command", "cat /etc/passwd"), ("memory", "AAAA")):
        sources = [{"type": kind, "channels": [0], "source": source}]
        recording = {"id": "r", "sources": sources, "sampling_rate": 16_000, "num_samples": 3200, "duration": SECONDS}
        cuts.append({"id": source, "type": "MonoCut", "start": 0, "duration": SECONDS, "recording": recording})
    corpus.put("lhotse/cuts.jsonl.gz", gzip.compress("\n".join(map(json.dumps, cuts)).encode()))
    phrases = ("leads out of the data folder", "a command, which is never run", "of type 'memory', not a file")
    corpus.rejects += [(f"lhotse/cuts.jsonl.gz:{line}", phrase) for line, phrase in enumerate(phrases, start=2)]
    touched = corpus.outside / "touched"
    corpus.put(
        "kaldi/wav.scp", f"u1 x.wav\nu2 touch {touched} |\nu3 {secret}\nu4 ../../outside/secret.wav\nu5 a.ark:17\n"
    )
    (corpus.root / "kaldi/text").symlink_to(corpus.outside / "secret.txt")
    out = "leads out of the data folder"
    kaldi = {"u2": "a command, which is never run", "u3": out, "u4": out, "u5": "a place in an archive"}
    corpus.rejects += [(f"kaldi/wav.scp: {key}", phrase) for key, phrase in kaldi.items()]
    corpus.rejects.append(("kaldi/text", "a link that leads out"))


def tables(corpus: Corpus) -> None:
    sounds = [corpus.tone() for _ in range(3)]
    table = pa.table({"audio": pa.array(sounds, pa.binary())})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    arrow = buffer.getvalue()
    corpus.put("tables/good.arrow", arrow)
    corpus.kept["tables/good.arrow"] += 3
    ends = struct.pack("<4i", *np.cumsum([0, *map(len, sounds)]))
    assert arrow.count(ends) == 1
    for name, wrong in {"beyond": (0, 1 << 30, 5, 9), "negative": (-4, 1, 2, 3), "back": (9000, 6000, 3000, 0)}.items():
        data = arrow.replace(ends, struct.pack("<4i", *wrong))
        corpus.bad(f"tables/{name}.arrow", data, "the table cannot be read")
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    parquet = buffer.getvalue()
    corpus.put("tables/good.parquet", parquet)
    corpus.kept["tables/good.parquet"] += 3
    corpus.bad("tables/cut.parquet", parquet[:-20], "the table cannot be read")
    corpus.bad("tables/footer.parquet", parquet[:-8] + b"\xff\xff\xff\x7fPAR1", "the table cannot be read")
    corpus.bad("tables/text.parquet", "PAR1" * 100, "the table cannot be read")
    os.symlink("nowhere", corpus.root / "tables/state.json")


# ---- the file system ------------------------------------------------------------------------------------------------


def links(corpus: Corpus) -> None:
    """Links, pipes, devices and files of holes; `out` would lead to what the whole machine holds."""
    folder = corpus.root / "links"
    corpus.good("links/near.wav")
    for name, target in {
        "inside.wav": "near.wav",  # stays below the data folder: read
        "secret.wav": str(corpus.outside / "secret.wav"),
        "out": str(corpus.outside / "folder"),
        "everything": "/",
        "gone.wav": "nowhere",
        "gone\\..\\..\\x.wav": "nowhere",
        "loop.wav": "loop.wav",
        "near.txt": str(corpus.outside / "secret.txt"),
        "zero.wav": "/dev/zero",
    }.items():
        (folder / name).symlink_to(target)
    corpus.kept["links/inside.wav"] += 1
    os.mkfifo(folder / "pipe.wav")
    for name in ("holes.wav", "text.txt"):
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40 if name == "holes.wav" else 3 << 20)
    corpus.put("links/text.wav", corpus.tone())
    out, gone = "a link that leads out", "the file is missing"
    corpus.rejects += [
        *((f"links/{name}", out) for name in ("secret.wav", "out/", "everything/", "near.txt", "zero.wav")),
        *((f"links/{name}", gone) for name in ("gone.wav", "gone\\..\\..\\x.wav")),
        ("links/loop.wav", "cannot be opened"),
        ("links/pipe.wav", "not a regular file"),
        ("links/holes.wav", "larger than 1024 MiB"),
        ("links/text.wav", "its text links/text.txt is larger than 1 MiB"),
    ]


def bombs(corpus: Corpus) -> None:
    """Little that becomes much."""
    good = json.dumps({"audio": "x.wav"}) + "\n"
    fill: dict[str, Callable[[], bytes]] = {
        "blank": lambda: b"\n" * 6_000_000,
        "rows": lambda: b"{}\n" * 150_000,
        "wide": lambda: b" " * (200 << 20),
    }
    for name, make in fill.items():
        corpus.put(f"bomb-{name}/cuts.jsonl.gz", gzip.compress(good.encode() + make(), 1))
        corpus.good(f"bomb-{name}/x.wav")
    corpus.rejects.append(("bomb-blank/cuts.jsonl.gz:4000001", "more than 4,000,000 lines"))
    corpus.rejects += [(f"bomb-rows/cuts.jsonl.gz:{line}", "no audio field") for line in range(2, 100_002)]
    corpus.rejects.append(("bomb-rows/cuts.jsonl.gz", "50,000 more of its rows are broken"))
    corpus.rejects.append(("bomb-wide/cuts.jsonl.gz:2", "longer than 1 MiB"))
    corpus.bad("list/manifest.json", "[" + "{}," * 2_000_001 + "{}]", "")
    corpus.rejects[-1] = ("list/manifest.json:1", "the JSON list is too large")
