"""What every test may use: quiet libraries, one thread, and the real audio where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real recordings; tests that need it are skipped on a clone that has none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this clone")
    return SHARED_DATA
