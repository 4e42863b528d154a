"""Which Prefect server a command takes: none of ours where a file of Prefect names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import server


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("home/profiles.toml", '[profiles.x]\nPREFECT_API_URL = "http://a/api"', True),
        ("home/profiles.toml", 'active = "local"\n[profiles.local]', False),
        (".env", "PREFECT_API_URL=http://a/api", True),
        ("prefect.toml", '[api]\nurl = "http://a/api"', True),
        ("prefect.toml", "not toml", False),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "http://a/api"', True),
        ("pyproject.toml", "[tool.prefect.server]\nmemo = 1", False),
    ],
)
def test_a_server_that_a_file_names_is_taken(
    name: str, text: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert server._file_names_one() is named
