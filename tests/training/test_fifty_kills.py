"""Fifty seeded kills -9 over everything a stage does: bit-identical weights, and no acknowledged checkpoint is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_kills_change_no_bit_and_lose_no_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"}
    environment |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # Arrow's allocator: no thread before a fork
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, str(HERE / "fifty_kills.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    runs = json.loads(ended.stdout.splitlines()[-1])
    wrong = [run for run in runs if run["wrong"]]
    assert not wrong, f"{json.dumps(wrong, indent=1)}\n{ended.stderr[-4000:]}"
    kills = [kill.partition(" ")[0] for run in runs for kill in run["killed"]]
    assert len(kills) >= 50
    assert len(set(kills)) == 14, sorted(set(kills))  # every kind of point was hit
