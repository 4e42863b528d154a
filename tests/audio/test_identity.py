"""What a file is known by, with and without belief in its header."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from blake3 import blake3

from components.audio.identity import digest_at, has_digest
from components.audio.sources import read_sources
from infra import storage


def flac(seed: int, form: str = "FLAC") -> bytes:
    samples = np.random.default_rng(seed).normal(0, 0.1, 16_000)
    made = io.BytesIO()
    soundfile.write(made, samples, 16_000, format=form)
    return made.getvalue()


def test_a_believed_flac_is_known_by_length_and_declared_samples(tmp_path: Path) -> None:
    file = tmp_path / "a.flac"
    sound = flac(0)
    known = set()
    for data in (sound, sound[:-1] + bytes([sound[-1] ^ 1]), sound + b"\0", flac(1)):
        file.write_bytes(data)
        assert digest_at(str(file)) == f"blake3:{blake3(data).hexdigest()}"
        believed = digest_at(str(file), trust=True)
        known.add(believed)
        assert has_digest(data, believed, trust=True) and not has_digest(data, believed)
        assert has_digest(data, digest_at(str(file)), trust=True)
    assert len(known) == 3  # a damaged frame is not seen


@pytest.mark.parametrize("data", [flac(0, "WAV"), flac(0)[:41], b"", flac(0)[:26] + bytes(16) + flac(0)[42:]])
def test_what_declares_no_samples_is_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.flac").write_bytes(data)
    assert digest_at(str(tmp_path / "a.flac"), trust=True) == f"blake3:{blake3(data).hexdigest()}"


def test_a_believed_folder_is_listed_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"{number}.flac").write_bytes(flac(number))

    def refuse(url: str, local: object) -> str:
        raise AssertionError(f"{url} was read")

    monkeypatch.setattr(storage, "fingerprint", refuse)
    recordings, rejects = read_sources(str(tmp_path), trust=True)
    assert not rejects and len({one.digest for one in recordings}) == 3
