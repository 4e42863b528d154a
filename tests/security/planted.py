"""Distinctive secrets, where a person has such, and the search for them in every byte that a run leaves."""

from __future__ import annotations

import base64
import io
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet

# By what they are; each is told from the others when it is found.
SECRETS = {
    "AWS key id": "AKIAPLANTEDKEYID0042",
    "AWS secret key": "plAnTed/Aws+SecretKey/0f1e2d3c4b5a69788796a5b4",
    "AWS session token": "planted-aws-session-token-77aa66bb55cc",
    "MLflow user": "planted-mlflow-user",
    "MLflow password": "planted-mlflow-pa55word",
    "Hugging Face token": "hf_PlantedTokenOfNobody0123456789",
    "Prefect login": "planted-prefect-user:planted-prefect-pa55",
    "Prefect password": "planted-prefect-pa55",
    "Ray token": "planted0ray0token0planted0ray0token0abcdef",
    "web password": "planted-web-pa55word",
    "web login": base64.b64encode(b"reader:planted-web-pa55word").decode(),
    "signature": "planted5ignature00ff11ee22dd33cc44bb",
}
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": SECRETS["AWS key id"],
    "AWS_SECRET_ACCESS_KEY": SECRETS["AWS secret key"],
    "AWS_SESSION_TOKEN": SECRETS["AWS session token"],
    "MLFLOW_TRACKING_USERNAME": SECRETS["MLflow user"],
    "MLFLOW_TRACKING_PASSWORD": SECRETS["MLflow password"],
    "HF_TOKEN": SECRETS["Hugging Face token"],
    "PREFECT_API_AUTH_STRING": SECRETS["Prefect login"],
    "RAY_AUTH_TOKEN": SECRETS["Ray token"],
    "FSSPEC_HTTPS": f'{{"client_kwargs": {{"headers": {{"Authorization": "Basic {SECRETS["web login"]}"}}}}}}',
}
FORBIDDEN = {what: secret for what, secret in SECRETS.items() if what not in ("MLflow user", "AWS key id")}


def spellings(secret: str) -> list[bytes]:
    """A secret as it is, as a URL and JSON write it, and in the base64 of a login or of itself."""
    plain = {secret, quote(secret, safe=""), quote(secret), secret.replace("/", "\\/")}
    login = f"{SECRETS['MLflow user']}:{SECRETS['MLflow password']}"
    coded = [base64.b64encode(text.encode()).rstrip(b"=") for text in (secret, login)]
    return [*(text.encode() for text in plain), *coded]


WANTED = [(what, spelling) for what, secret in FORBIDDEN.items() for spelling in spellings(secret)]


def found_in(where: str, data: bytes) -> list[str]:
    """What of the secrets is in `data`, as `where: what`; Parquet and SQLite are also read as tables."""
    texts = [data, *_decoded(data)]
    return sorted({f"{where}: {what}" for what, spelling in WANTED if any(spelling in text for text in texts)})


def found_below(folder: Path, but: Iterable[str] = ()) -> tuple[list[str], int]:
    """What of the secrets is in the files below a folder, and how many files were read; `but` are file names."""
    leaks, count = [], 0
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name not in but:
            with suppress(FileNotFoundError, OSError):  # a socket, or a file that a process has just removed
                leaks += found_in(str(path), path.read_bytes())
                count += 1
    return leaks, count


def _decoded(data: bytes) -> Iterator[bytes]:
    if data.startswith(b"PAR1"):
        yield repr(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()).encode()
    elif data.startswith(b"SQLite format 3\0"):
        with closing(sqlite3.connect(":memory:")) as database, suppress(sqlite3.Error):
            # A database that was being written ahead is opened as if it was not: the log beside it is read as it is.
            database.deserialize(data[:18] + b"\x01\x01" + data[20:])
            for (name,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                yield repr(database.execute(f'select * from "{name}"').fetchall()).encode()
