"""infra/secrets.py: what is hidden in texts, what is left alone, and which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.secrets import redacted, refuse
from infra.stores import shown
from pipelines.config import RunConfig
from pipelines.overrides import WrongSetting, run_config

KEY = "AKIAIOSFODNN7EXAMPLE"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("https://me:p@w@host/x", "https://***@host/x"),
        ("http://me:p/w@host:5000/x failed", "http://***@host:5000/x failed"),
        ("s3://b/x?X-Amz-Signature=ab12 (again)", "s3://b/x?*** (again)"),
        ("postgresql://me:pw@db/mlflow", "postgresql://***@db/mlflow"),
        ("{'password': 'hunter22', 'n': 1}", "{'password': '***', 'n': 1}"),
        ('{"Authorization": "Basic bWU6cHc="}', '{"Authorization": "Basic ***"}'),
        ("authorization: Bearer abc.def-123", "authorization: Bearer ***"),
        (f"the key {KEY} is unknown", "the key *** is unknown"),
        ("hf_abcdefghijklmnopqrst", "***"),
    ],
)
def test_what_is_hidden(text: str, said: str) -> None:
    assert redacted(text, {}) == said
    assert redacted(redacted(text, {}), {}) == said


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/models/asr@candidate",
        "s3://bucket/lake/audio/v1/shard-000000.tar",
        "funasr_llm-demo@candidate, version 1",
        "what is said? (see https://host/page)",
        "tokens: 1024, the password is wrong",
        "/home/ada/a@b/x.wav",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert (
        redacted(text, {"TOKENIZERS_PARALLELISM": "candidate", "RAY_AUTH_MODE": "version", "HOME": "/home/ada"}) == text
    )


def test_values_of_the_environment_are_hidden_as_a_url_writes_them_too() -> None:
    given = '{"client_kwargs": {"headers": {"Authorization": "Basic bWU6cHc9"}}, "endpoint_url": "http://host"}'
    assert redacted("GET http://host: bWU6cHc9", {"FSSPEC_HTTPS": given}) == "GET http://host: ***"
    environment = {"AWS_SECRET_ACCESS_KEY": "a/b+c=d e", "EARLOOM_AUTH": "ada:correct-horse", "HF_TOKEN": "short"}
    assert redacted("a/b+c=d e, a%2Fb%2Bc%3Dd%20e", environment) == "***, ***"
    slash = {"AWS_SECRET_ACCESS_KEY": "/starts/with+one", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"}
    assert redacted("/starts/with+one /var/run/token", slash) == "*** /var/run/token"
    assert redacted("correct-horse of ada; a short one", environment) == "*** of ada; a short one"


@given(st.text(alphabet="ab/:@?#%.=& '\"\n", max_size=60))
def test_no_text_is_too_odd(text: str) -> None:
    assert isinstance(redacted(f"x://{text}", {}), str)


@settings(max_examples=40)
@given(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.from_regex(r"[A-Za-z0-9!$@._~-]{1,20}", fullmatch=True))
def test_no_password_of_a_url_stays(user: str, password: str) -> None:
    assert redacted(f"GET https://{user}:{password}@host.test/x: 401", {}) == "GET https://***@host.test/x: 401"


@pytest.mark.parametrize(
    ("setting", "url", "instead"),
    [
        ("tracking_uri", "http://me:pw@host", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking_uri", "postgresql://me:pw@host/x", "MLFLOW_TRACKING_URI"),
        ("data", "https://me:pw@host/x", "FSSPEC_HTTPS"),
        ("data", "https://host/x?X-Amz-Signature=abcdef", "docs/s3.md"),
        ("lake", "s3://key:secret@bucket/x", "a profile or a role"),
        ("ray_address", "http://me:pw@host:8265", "RAY_AUTH_TOKEN"),
        ("ray_env", {"env_vars": {"HF_TOKEN": "abcdef"}}, "their own environment"),
        ("ray_env", {"pip": ["--extra-index-url https://me:pw@host/simple"]}, "their own environment"),
        ("set", {"encoders.audio.weights": "https://me:pw@host/x.pt"}, "docs/s3.md"),
    ],
)
def test_settings_with_a_secret_are_refused_and_not_repeated(setting: str, url: Any, instead: str) -> None:
    words: dict[str, Any] = {"arch": "funasr_llm", "data": "d"} | {setting: url}
    for build in (run_config, lambda given: RunConfig.model_validate(given)):
        with pytest.raises((WrongSetting, ValidationError)) as caught:
            build(words)
        said = str(caught.value)
        assert setting in said
        assert not any(secret in said for secret in ("me:pw", "pw@", "abcdef", "key:secret"))
    with pytest.raises(ValueError, match=f"^{setting}: .*holds") as refused:
        refuse(url, setting)
    assert instead in str(refused.value)


@pytest.mark.parametrize("url", ["sqlite:////tmp/a@b/x.db", "s3://b/a@b/x", "/data/what?/x@y", "http://host:5000"])
def test_plain_places_are_not_refused(url: str) -> None:
    refuse(url, "data")
    refuse({"env_vars": {"PLACE": url, "HF_TOKEN_PATH": "/x", "MAX_TOKENS": 4}}, "ray_env")


def test_errors_of_the_stores_use_the_same() -> None:
    assert shown is redacted
