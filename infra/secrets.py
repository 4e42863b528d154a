"""What only its owner should see, kept out of logs, records, errors and pages: one way to find it and to hide it.

A secret comes with a URL (user and password, the query of a signed one), or from the environment: the variables whose
names say so. What is written down is `redacted`; a setting that would be written down with a secret is refused, as the
environment can give it without anybody reading it later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
SHORTEST = 8  # characters of a value that counts as a secret: shorter ones are words such as "token" or "none"

# Names of variables whose values nobody else should see. TOKENIZERS_PARALLELISM is none of them.
NAMES = re.compile(
    r"SECRET|TOKEN(?!IZ)|PASSW|ACCESS_KEY|API_KEY|PRIVATE_KEY|AUTH(?:_STRING)?$|CREDENTIALS?$|CONNECTION_URL"
)
PLACES = re.compile(r"_(PATH|FILE|DIR|URL)$(?<!CONNECTION_URL)")  # they name where a secret lies
HARMLESS = re.compile(r"(?i)disabled|enabled|default")

# Where a secret goes that a setting may not hold.
INSTEAD = {
    "data": "S3 keys come from the environment, a profile or a role, the login of a web server from $FSSPEC_HTTPS; "
    "docs/s3.md shows both",
    "tracking_uri": "MLflow's login is $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD, a database's URI as a "
    "whole $MLFLOW_TRACKING_URI",
    "ray_env": "give it to the machines or pods of the cluster, as their own environment",
    "ray_address": "a cluster's token is $RAY_AUTH_TOKEN, with $RAY_AUTH_MODE=token",
}

# Parts of a text that are secrets whatever the environment says.
LOGIN = re.compile(r"(?<=://)[^/?#\s'\"<>]+@")
UNQUOTED = re.compile(r"(?<=://)[^/:@\s'\"<>]+:(?!\d+[/\s])[^@\s'\"<>]*@")  # a password with a / that should be %2F
QUERY = re.compile(r"(?<=://)([^?\s'\"<>]*)\?[^\s'\"<>]+")
KNOWN = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{16,}\b")  # an AWS key id, a Hugging Face token
ASSIGNED = re.compile(  # `password=…`, `"secret": "…"` and headers, in a message or a printed dictionary
    r"(?i)((?:password|passwd|secret(?:_?access_?key)?|api_?key|auth_?string|signature|security-token"
    r"|authorization)[\"']?\s*[=:]\s*[\"']?(?:(?:basic|bearer)\s+)?)(?!(?:basic|bearer)\s)[^\s\"'&,;)}]{4,}"
)
FSSPEC = re.compile(r'(?i)"(?:key|secret|token|password|authorization)"\s*:\s*"(?:basic |bearer )?([^"]+)"')


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """A URL or a message with `***` for passwords, queries of URLs, tokens, and values of the environment's secrets."""
    for pattern in (LOGIN, UNQUOTED):
        text = pattern.sub(f"{HIDDEN}@", text)
    text = QUERY.sub(rf"\1?{HIDDEN}", text)
    for value in sorted(set(values(environment)), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return ASSIGNED.sub(rf"\1{HIDDEN}", KNOWN.sub(HIDDEN, text))


def values(environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Values of the environment that are secret, as they are and as a URL writes them."""
    for name, value in (os.environ if environment is None else environment).items():
        if name.startswith("FSSPEC_"):  # JSON, in which some values are secret
            yield from (inner for inner in FSSPEC.findall(value) if len(inner) >= SHORTEST)
        if PLACES.search(name) or not NAMES.search(name.upper()) or HARMLESS.fullmatch(value):
            continue
        if len(value) >= SHORTEST:
            yield from {value, quote(value, safe=""), quote_plus(value)}
            if "AUTH" in name and len(password := value.partition(":")[2]) >= SHORTEST:  # user:password
                yield password


def refuse(value: Any, setting: str) -> None:
    """ValueError if a setting, which is about to be written down, holds a secret: a URL with a login or a signed query,
    or a variable of the environment whose name says so. Lists and dictionaries are looked through.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse(inner, setting)
            if isinstance(inner, str) and inner and NAMES.search(str(name)) and not PLACES.search(str(name)):
                raise _refusal(setting, f"holds {name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse(inner, setting)
    elif isinstance(value, str) and "sqlite:" not in value:
        if LOGIN.search(value):
            raise _refusal(setting, f"{redacted(value)} holds a user or password")
        if QUERY.search(value):
            raise _refusal(setting, f"{redacted(value)} holds the query of a signed URL")


def _refusal(setting: str, what: str) -> ValueError:
    instead = INSTEAD.get(setting, INSTEAD["data"])
    return ValueError(f"{setting}: {what}, which records and servers would keep: leave it out; {instead}")
