"""What every test may use: quiet libraries, one thread, and the real audio where it is at hand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from infra.processes import free_port

# A machine that is busy is no fault of an example.
settings.register_profile("earloom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("earloom")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("EARLOOM_USE_UP", "0")  # never the services of the person who runs the tests

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real recordings; tests that need it are skipped on a clone that has none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this clone")
    return SHARED_DATA


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of an empty bucket on an S3 server of our own; the environment says where that is."""
    import boto3
    from s3fs import S3FileSystem

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patched.setenv("AWS_ACCESS_KEY_ID", "testing")
            patched.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
            patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
            S3FileSystem.clear_instance_cache()  # else one that was made for another server would be taken
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            boto3.client("s3").create_bucket(Bucket="lake")
            yield "s3://lake"
            S3FileSystem.clear_instance_cache()
    finally:
        server.terminate()
        server.wait()
