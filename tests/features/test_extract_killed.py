"""SIGKILL in the middle of a shard, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from feature_helpers import SmallEncoder, make_audio

from components.digest import digest_file
from components.features.extract import extract_shard

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, signal, sys
from pathlib import Path
import components.features.extract as extract
from feature_helpers import SmallEncoder, make_audio
audio, index = make_audio(Path(sys.argv[1]) / "audio", [[2.0, 30.0, 1.0]])
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(extract, sys.argv[2], killed)
extract.extract_shard(audio.shards[0], index, sys.argv[1] + "/audio", SmallEncoder(), sys.argv[1] + "/features")
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["write_tar", "write_part"])
def test_a_killed_process_leaves_nothing_that_is_read(point: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), point], env=environment, cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    audio, index = make_audio(tmp_path / "audio", [[2.0, 30.0, 1.0]])
    parts = [
        extract_shard(audio.shards[0], index, str(tmp_path / "audio"), SmallEncoder(), str(tmp_path / name))
        for name in ("features", "whole")
    ]
    assert parts[0] == parts[1]
    assert not parts[0].reused
    assert digest_file(tmp_path / "features/shard-000000.tar") == digest_file(tmp_path / "whole/shard-000000.tar")
