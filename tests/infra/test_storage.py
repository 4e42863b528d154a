"""infra/storage.py on this disk and in the memory file system: names, atomic writes, listings, copies."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import disk, storage, stores


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


@pytest.mark.parametrize(
    ("url", "joined"),
    [
        ("lake", "lake/a/b c.wav"),
        ("lake/", "lake/a/b c.wav"),
        ("/", "/a/b c.wav"),
        (".", "./a/b c.wav"),
        ("", "a/b c.wav"),
        ("file:///", "file:///a/b c.wav"),
        ("memory://", "memory://a/b c.wav"),
        ("s3://bucket/", "s3://bucket/a/b c.wav"),
    ],
)
def test_join_puts_names_below_a_root(url: str, joined: str) -> None:
    assert storage.join(url, "a", "./b c.wav") == joined
    assert storage.join(url, "a/b c.wav") == joined
    assert storage.join(joined, "") == joined


@pytest.mark.parametrize("part", ["..", "a/..", "../x", "a/../../x", "/etc/passwd", "/", "s3://other/x", "a\0b"])
def test_join_refuses_to_leave_the_root(part: str) -> None:
    for url in ("lake", "s3://bucket/lake", "memory://lake"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            storage.join(url, part)
        with pytest.raises(ValueError, match="leads out of its folder"):
            storage.join(url, "fine", part)


@given(st.lists(st.text(), max_size=4))
def test_whatever_is_joined_stays_below_the_root(parts: list[str]) -> None:
    try:
        joined = storage.join("/lake", *parts)
    except ValueError:
        return
    assert os.path.normpath(joined) == "/lake" or os.path.normpath(joined).startswith("/lake/")


def test_is_local_and_local_path() -> None:
    assert all(storage.is_local(url) for url in ("a/b", "/a", "file:///a"))
    assert not any(storage.is_local(url) for url in ("s3://b/a", "memory://a"))
    assert storage.local_path("file:///a/b c") == Path("/a/b c")
    assert storage.local_path("~/x") == Path.home() / "x"
    with pytest.raises(ValueError, match=r"s3://b/a is not on this machine: .*local_copy"):
        storage.local_path("s3://b/a")


def test_what_is_written_is_read_whole_and_in_part(root: str) -> None:
    url = storage.join(root, "new/folder/file.bin")
    assert not storage.exists(url)
    assert not storage.exists(storage.join(root, "new"))
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url)
    assert storage.exists(storage.join(root, "new"))
    assert (storage.size(url), storage.read_bytes(url)) == (10, b"0123456789")
    assert [storage.read_range(url, *span) for span in ((0, 4), (3, 2), (8, 9), (4, 0))] == [b"0123", b"34", b"89", b""]
    with pytest.raises(ValueError, match="no range"):
        storage.read_range(url, -1, 2)
    storage.write_bytes(url, b"short")
    assert (storage.size(url), storage.read_bytes(url)) == (5, b"short")
    with storage.open_read(url) as one, storage.open_read(url) as two:
        assert (one.read(2), two.read(), one.seek(1), one.read()) == (b"sh", b"short", 1, b"hort")


def test_text_and_json(root: str) -> None:
    url = storage.join(root, "a.json")
    storage.write_json(url, {"name": "ünïcode", "list": [1, 2.5, None]})
    assert storage.read_json(url) == {"name": "ünïcode", "list": [1, 2.5, None]}
    assert storage.read_text(url).startswith('{\n  "name": "ünïcode",')
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(url, float("nan"))
    storage.write_text(url, '{"cut": ')
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*run the stage again"):
        storage.read_json(url)


def test_what_is_missing_is_said_with_its_name(root: str) -> None:
    url = storage.join(root, "missing.bin")
    for read in (storage.read_bytes, storage.size, storage.fingerprint, storage.open_read):
        with pytest.raises(FileNotFoundError, match=r"missing\.bin"):
            read(url)
    storage.write_bytes(storage.join(root, "folder/x"), b"x")
    for read in (storage.size, storage.fingerprint):
        with pytest.raises(IsADirectoryError):
            read(storage.join(root, "folder"))


def test_listings_are_sorted_and_hide_what_is_unfinished(root: str) -> None:
    hidden = (".tmp-123", ".scratch/x/y.wav", "b/.tmp-1/z.wav")
    for name in ("b/2.WAV", "b/10.wav", "a.txt", "c/d/e.flac", "bb/1.wav", "b/[x]*.wav", *hidden):
        storage.write_bytes(storage.join(root, name), b"x")
    assert storage.list_names(root) == ["a.txt", "b", "bb", "c"]
    assert storage.list_names(storage.join(root, "b")) == ["10.wav", "2.WAV", "[x]*.wav"]
    assert storage.find(root) == ["a.txt", "b/10.wav", "b/2.WAV", "b/[x]*.wav", "bb/1.wav", "c/d/e.flac"]
    assert storage.find(storage.join(root, "b"), (".wav",)) == ["10.wav", "2.WAV", "[x]*.wav"]
    for nothing in ("missing", "a.txt"):
        assert storage.list_names(storage.join(root, nothing)) == []
        assert storage.find(storage.join(root, nothing)) == []


def test_find_follows_links_to_folders_once(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/x.wav").write_bytes(b"x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/near").symlink_to(tmp_path / "far")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    assert storage.find(str(tmp_path / "data")) == ["near/x.wav"]


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for read in (storage.read_bytes, storage.fingerprint, storage.size):
            with pytest.raises(OSError, match="not a regular file"):
                read(str(tmp_path / name))


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_that_race_to_create_a_file_wins(root: str, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    for attempt in range(5):
        url = storage.join(root, f"manifest-{attempt}.json")
        barrier, won = threading.Barrier(16), []

        def publish(number: int, url: str = url, barrier: threading.Barrier = barrier, won: list[int] = won) -> None:
            barrier.wait()
            if storage.publish_bytes(url, b"%d" % number * 1000):
                won.append(number)

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert storage.read_bytes(url) == b"%d" % won[0] * 1000
        assert storage.publish_bytes(url, b"late") is False
    assert len(storage.find(root)) == 5
    if storage.is_local(root):
        assert len(os.listdir(storage.local_path(root))) == 5


def test_readers_never_see_a_part_of_a_write(tmp_path: Path) -> None:
    url, done = str(tmp_path / "state"), threading.Event()
    storage.write_bytes(url, b"a" * 200_000)

    def write() -> None:
        for letter in b"bcdefgh":
            storage.write_bytes(url, bytes([letter]) * 200_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        data = storage.read_bytes(url)
        assert (len(data), len(set(data))) == (200_000, 1)
    writer.join()


def test_a_write_that_fails_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "state")
    storage.write_bytes(url, b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    for write in (storage.write_bytes, storage.publish_bytes):
        with pytest.raises(OSError, match="no space left"):
            write(url, b"new")
    assert os.listdir(tmp_path) == ["state"]
    assert Path(url).read_bytes() == b"old"


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        storage.write_bytes(str(tmp_path / "a"), b"")
        storage.publish_bytes(str(tmp_path / "b"), b"")
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode & 0o777) for name in "ab"] == ["0o644", "0o644"]


def test_upload_brings_a_file_to_its_place(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "lake/shard.tar")
    for content in (b"first", b"second"):
        local = storage.scratch(url) / uuid.uuid4().hex
        local.write_bytes(content)
        storage.upload(local, url)
        assert storage.read_bytes(url) == content
        local.unlink(missing_ok=True)
    assert storage.list_names(storage.join(root, "lake")) == ["shard.tar"]


def test_upload_from_another_disk_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    local, url, replace = tmp_path / "there/x", tmp_path / "here/x", os.replace
    local.write_bytes(b"content")

    def across(source: Any, target: Any) -> None:
        if Path(source) == local:
            raise OSError(errno.EXDEV, "cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", across)
    storage.upload(local, str(url))
    assert (url.read_bytes(), local.exists(), os.listdir(tmp_path / "here")) == (b"content", False, ["x"])


def test_a_folder_is_copied_and_removed(root: str, tmp_path: Path) -> None:
    local = tmp_path / "model"
    for name in ("config.json", "deep/er/weights.safetensors"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(name.encode())
    target = storage.join(root, "lake/model")
    storage.write_bytes(storage.join(root, "lake/model-2/config.json"), b"keep")
    storage.upload_folder(local, target)
    assert storage.find(target) == storage.find(str(local)) == ["config.json", "deep/er/weights.safetensors"]
    assert storage.read_text(storage.join(target, "deep/er/weights.safetensors")) == "deep/er/weights.safetensors"
    storage.remove_tree(target)
    storage.remove_tree(target)
    assert storage.find(storage.join(root, "lake")) == ["model-2/config.json"]


def test_removing_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/here")
    for url in ("/", ".", str(tmp_path / "work"), "~", "s3://bucket", "s3://bucket/", "memory://"):
        with pytest.raises(ValueError, match="is not removed"):
            storage.remove_tree(url)


def test_removing_a_link_keeps_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    storage.remove_tree(str(tmp_path / "link"))
    assert storage.find(str(tmp_path)) == ["data/x"]


def test_local_copy_is_the_file_itself_or_a_download(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "lake/shard.tar")
    storage.write_bytes(url, b"tar")
    folder = tmp_path / "copies"
    copy = storage.local_copy(url, folder)
    assert copy.read_bytes() == b"tar"
    assert copy == (storage.local_path(url) if storage.is_local(url) else folder / "shard.tar")
    with pytest.raises(FileNotFoundError):
        storage.local_copy(storage.join(root, "missing"), folder)


def test_fingerprint_is_of_the_bytes(root: str) -> None:
    url = storage.join(root, "x")
    storage.write_bytes(url, b"abc")
    assert storage.fingerprint(url) == hashlib.sha256(b"abc").hexdigest()


def test_scratch_is_beside_its_place_and_forgets_what_is_old(tmp_path: Path) -> None:
    folder = storage.scratch(str(tmp_path / "lake/audio/v1"))
    assert folder == tmp_path / "lake/audio/.scratch"
    assert folder.is_dir()
    for name, age in (("old", 8), ("new", 1)):
        (folder / name).mkdir()
        (folder / name / "half.tar").write_bytes(b"half")
        os.utime(folder / name, (time.time() - 86_400 * age,) * 2)
    assert os.listdir(storage.scratch(str(tmp_path / "lake/audio/v1"))) == ["new"]
    assert storage.find(str(tmp_path)) == []
    remote = storage.scratch("s3://bucket/audio/v1")
    assert remote.is_dir()
    assert oct(remote.stat().st_mode & 0o777) == "0o700"


def failing(monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> Callable[[Any, str], bytes]:
    monkeypatch.setattr(stores, "WAITS", (0.0, 0.0))

    def action(files: Any, path: str) -> bytes:
        if failures:
            raise failures.pop(0)
        return b"there"

    return action


def test_remote_calls_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [OSError("reset"), TimeoutError()]
    assert stores.attempt("memory://x", failing(monkeypatch, failures)) == b"there"
    with pytest.raises(OSError, match=r"memory://x cannot be reached \(OSError: reset\): check the network"):
        stores.attempt("memory://x", failing(monkeypatch, [OSError("reset")] * 3))
    forbidden: list[Exception] = [PermissionError("no"), OSError("later")]
    with pytest.raises(PermissionError, match="memory://x: no"):
        stores.attempt("memory://x", failing(monkeypatch, forbidden))
    assert len(forbidden) == 1


def test_no_secret_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    text = "refused wJalrXUtnFEMI at sftp://me:pass@host/x and https://h/x?X-Amz-Signature=abc (again)"
    assert storage.shown(text) == "refused *** at sftp://***@host/x and https://h/x?*** (again)"
    with pytest.raises(OSError, match="reached") as caught:
        stores.attempt("memory://u:pass@x", failing(monkeypatch, [OSError(text)] * 3))
    assert "wJalrXUtnFEMI" not in str(caught.value)
    assert "pass" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_an_unknown_protocol_is_one_clear_line() -> None:
    for url in ("nothing://x/y", "simplecache::s3://x/y"):
        with pytest.raises(ValueError, match=r"cannot be opened .*: install that package or correct the URL"):
            storage.read_bytes(url)


def test_folders_that_cannot_be_synced_are_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.EINVAL, "not here")

    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(os, "fsync", refuse)
    disk.sync(tmp_path)
    with pytest.raises(OSError, match="not here"):
        disk.sync(tmp_path / "file")
