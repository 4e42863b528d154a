"""infra/s3.py: where credentials and the endpoint come from, and encryption of whatever is written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import objects, s3, storage, stores

CHAIN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting of the person who runs the tests, and no client of an earlier test."""
    from s3fs import S3FileSystem

    for name in (s3.SSE, s3.KMS_KEY, s3.ADDRESSING):
        monkeypatch.delenv(name, raising=False)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def head(key: str) -> dict[str, Any]:
    """What the store says of an object in the bucket, asked for by another client than ours."""
    import boto3

    found: dict[str, Any] = boto3.client("s3").head_object(Bucket="lake", Key=key)
    return found


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({}, {}),
        ({s3.SSE: "AES256"}, {"ServerSideEncryption": "AES256"}),
        ({s3.SSE: "aws:kms"}, {"ServerSideEncryption": "aws:kms"}),
        ({s3.SSE: "aws:kms", s3.KMS_KEY: "k1"}, {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k1"}),
    ],
)
def test_what_is_sent(settings: dict[str, str], sent: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert s3.encryption() == sent
    assert s3.options({}).get("s3_additional_kwargs", {}) == sent
    assert json.loads(s3.mlflow_environment().get("MLFLOW_S3_UPLOAD_EXTRA_ARGS", "{}")) == sent


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({s3.SSE: "AES-256"}, r"EARLOOM_S3_SSE='AES-256' is unknown to S3: set AES256"),
        ({s3.KMS_KEY: "k1"}, r"EARLOOM_S3_KMS_KEY needs EARLOOM_S3_SSE=aws:kms"),
        ({s3.SSE: "AES256", s3.KMS_KEY: "k1"}, r"with 'AES256' the key would not be used"),
        ({s3.ADDRESSING: "host"}, r"EARLOOM_S3_ADDRESSING='host' is no style"),
    ],
)
def test_wrong_settings_are_said(settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        storage.read_bytes("s3://lake/x")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "key"), [("AES256", ""), ("aws:kms", ""), ("aws:kms", "alias/earloom")])
def test_everything_that_is_written_is_encrypted(
    kind: str, key: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request, parts, conditional puts, copies by other libraries; and all of it reads back."""
    monkeypatch.setenv(s3.SSE, kind)
    if key:
        monkeypatch.setenv(s3.KMS_KEY, key)
    root, large = f"{bucket}/sse-{kind[:3]}{len(key)}", bytes(range(256)) * (objects.PART // 128)
    (tmp_path / "large").write_bytes(large)
    storage.write_bytes(f"{root}/small", b"1")
    assert storage.publish_bytes(f"{root}/published", b"2")
    assert not storage.publish_bytes(f"{root}/published", b"3")
    storage.upload(tmp_path / "large", f"{root}/parts")
    _by_pyarrow(f"{root}/arrow", large)
    files, path = stores.file_system(root)
    files.copy(f"{path}/small", f"{path}/copied")
    prefix = root.partition("lake/")[2]
    for name, data in (("small", b"1"), ("published", b"2"), ("parts", large), ("arrow", large), ("copied", b"1")):
        said = head(f"{prefix}/{name}")
        assert said["ServerSideEncryption"] == kind, name
        assert not key or said["SSEKMSKeyId"].endswith(key), name
        assert storage.read_bytes(f"{root}/{name}") == data, name


def _by_pyarrow(url: str, data: bytes) -> None:
    """As Ray Train writes what it keeps of a run, in pipelines/remote.py."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    files, path = stores.file_system(url)
    with PyFileSystem(FSSpecHandler(files)).open_output_stream(path) as stream:
        stream.write(data)


@pytest.mark.slow
def test_without_the_setting_nothing_is_asked_for(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/plain", b"1")
    assert "SSEKMSKeyId" not in head("plain")
    assert head("plain").get("ServerSideEncryption") in (None, "AES256")  # S3 encrypts by itself since 2023


@pytest.mark.slow
def test_mlflow_encrypts_what_it_uploads_itself(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/s3.md says; we never have it upload a model, but its server may keep other artifacts on S3."""
    from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

    monkeypatch.setenv(s3.SSE, "aws:kms")
    for name, value in s3.mlflow_environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "page.html").write_text("x")
    S3ArtifactRepository(f"{bucket}/mlflow").log_artifact(str(tmp_path / "page.html"))
    assert head("mlflow/page.html")["ServerSideEncryption"] == "aws:kms"


@pytest.mark.slow
def test_keys_come_from_a_profile(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys, region and endpoint in a profile and nothing of them in the environment."""
    import os

    from botocore.session import Session

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    for name in (*CHAIN, "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = one\naws_secret_access_key = two-two-two\n")
    (tmp_path / "config").write_text(f"[profile team]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    storage.write_bytes(f"{bucket}/by-profile", b"1")
    assert storage.read_bytes(f"{bucket}/by-profile") == b"1"
    assert Session().get_credentials().access_key == "one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "asked"),
    [("path", "store.test/box/deep/x"), ("virtual", "box.store.test/deep/x"), ("", "store.test/box/deep/x")],
)
def test_how_a_bucket_is_addressed(style: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of an endpoint of one's own, seen by a proxy: its name needs no entry in any name server."""
    seen: list[tuple[str, str]] = []

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["Authorization"].partition("/")[0]))
            self.send_response(200)
            self.send_header("Content-Length", "1")
            self.send_header("Content-Range", "bytes 0-0/1")
            self.end_headers()
            self.wfile.write(b"1")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.test")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
        monkeypatch.setenv(s3.ADDRESSING, style)
        assert storage.read_bytes("s3://box/deep/x") == b"1"
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [(f"http://{asked}", "AWS4-HMAC-SHA256 Credential=key")]
