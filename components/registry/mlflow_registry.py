"""MLflow as a catalogue of model folders: names, versions, aliases, metrics. It never stores or loads a model.

A version points at a folder (transformers layout, safetensors) at any fsspec URL; what is loaded is always that
folder, by us. The catalogue is an sqlite file beside the lake, or any MLflow server.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.digest import digest
from infra import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "earloom"
LOCAL = "local://"
DIGEST_TAG = "earloom.digest"
BATCH = 1000  # metrics in one call, MLflow's limit


class Registered(NamedTuple):
    """A version as it stands in the registry; `uri` is what MLflow calls it, `new` says if this call made it."""

    name: str
    version: str
    alias: str | None
    uri: str
    new: bool


class Found(NamedTuple):
    """Where a version's folder lies."""

    url: str
    version: str
    tags: dict[str, str]


class Entry(NamedTuple):
    """One line of the catalogue."""

    name: str
    version: str
    aliases: tuple[str, ...]
    url: str
    tags: dict[str, str]


def register(
    folder_url: str,
    name: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    alias: str | None,
    tracking_uri: str,
    *,
    params: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    folder_digest: str | None = None,
    description: str = "",
) -> Registered:
    """Make the folder a version of `name`; the same content again gives the version that is there.

    `history` are lines of metrics.jsonl, whose numbers become curves of the MLflow run. `folder_digest` spares
    reading the folder. Raises ValueError for an impossible name or alias, FileNotFoundError for an empty folder,
    ConnectionError if the server does not answer or refuses.
    """
    check_name(name)
    if alias is not None:
        check_alias(alias)
    source = str(storage.local_path(folder_url).resolve()) if storage.is_local(folder_url) else folder_url.rstrip("/")
    names = storage.list_names(source)
    if not names:
        raise FileNotFoundError(f"nothing to register: {source} is empty or missing; train a model first")
    identity = folder_digest or digest_folder(source)
    with _client(tracking_uri) as client:
        _create_model(client, name)
        existing = _version_of(client, name, identity)
        if existing is None:
            run_id = _run(client, name, identity, metrics, params or {}, history)
            labels = {str(key): str(value)[:5000] for key, value in tags.items()} | {DIGEST_TAG: identity}
            made = client.create_model_version(
                name,
                to_source(source),
                run_id=run_id,
                tags=labels,
                description=description or None,
                await_creation_for=0,
            )
            version = str(made.version)
        else:
            version = existing
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
    return Registered(name, version, alias, f"models:/{name}/{version}", existing is None)


def find(model: str, tracking_uri: str) -> Found:
    """The folder of `NAME` (newest version), `NAME@alias` or `NAME/version`; LookupError says what there is."""
    name, alias, version = parse_model(model)
    with _client(tracking_uri) as client:
        entries = [entry for entry in _entries(client, name) if entry.name == name]
        if not entries:
            known = ", ".join(sorted({entry.name for entry in _entries(client)})) or "none yet"
            raise LookupError(f"no model named {name!r} in {shown(tracking_uri)}; there are: {known}")
    matching = [entry for entry in entries if alias in (None, *entry.aliases) and version in (None, entry.version)]
    if not matching:
        there = ", ".join("".join([entry.version, *(f" @{a}" for a in entry.aliases)]) for entry in entries)
        wanted = f"alias @{alias}" if alias else f"version {version}"
        raise LookupError(f"model {name!r} has no {wanted}; its versions are: {there}")
    newest = max(matching, key=lambda entry: int(entry.version))
    return Found(newest.url, newest.version, newest.tags)


def catalogue(tracking_uri: str) -> list[Entry]:
    """Every version of every model that Earloom registered, by name, newest first."""
    with _client(tracking_uri) as client:
        return sorted(_entries(client), key=lambda entry: (entry.name, -int(entry.version)))


def parse_model(model: str) -> tuple[str, str | None, str | None]:
    """`NAME[@alias|/version]` → (name, alias, version); `@latest` is the newest version, as without an alias."""
    name, at, alias = model.partition("@")
    name, slash, version = name.partition("/") if not at else (name, "", "")
    check_name(name)
    if slash and not version.isdecimal():
        raise ValueError(f"{model!r}: what follows the / must be a version number, as in {name}/3")
    if at and alias.lower() != "latest":
        check_alias(alias)
        return name, alias, None
    return name, None, str(int(version)) if slash else None


def check_name(name: str) -> None:
    """ValueError unless a name can be a registered model's, a folder's and a word on the command line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) or ".." in name:
        raise ValueError(
            f"{name!r} cannot be a model's name: use letters, digits, '.', '_' and '-', starting with a letter or "
            "digit, without '/' and '..'"
        )


def check_alias(alias: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", alias) or re.fullmatch(r"(?i)v\d+|latest", alias):
        raise ValueError(
            f"{alias!r} cannot be an alias: use letters, digits, '_' and '-', but not 'latest' or 'v' and a number"
        )


def digest_folder(url: str) -> str:
    """sha256 over the names and contents of the files under a URL."""
    return digest({name: storage.fingerprint(storage.join(url, name)) for name in storage.find(url)})


def to_source(url: str) -> str:
    """What MLflow keeps as a version's source. A server refuses bare local paths, as it might be made to serve any
    file of its own machine; `local://`, which it cannot open, only says where the folder lies for us.
    """
    return f"{LOCAL}{url}" if storage.is_local(url) else url


def from_source(source: str) -> str:
    return source.removeprefix(LOCAL)


def shown(tracking_uri: str) -> str:
    """A tracking URI without user and password."""
    return re.sub(r"//[^/@]*@", "//", tracking_uri)


@contextmanager
def _client(tracking_uri: str) -> Iterator[MlflowClient]:
    """A quiet client; MLflow's own errors become ConnectionError with the place, never with a password."""
    # Before the import: nothing is sent home, and a server that is down is noticed in seconds, not minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if match := re.fullmatch(r"sqlite:///(.+)", tracking_uri):
        Path(match[1]).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient  # 3 to 4 seconds, so only where it is used
    from mlflow.exceptions import MlflowException

    for logger in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    try:
        yield MlflowClient(tracking_uri, registry_uri=tracking_uri)
    except MlflowException as error:
        said = "it does not answer; is it running?" if "Max retries" in str(error) else shown(str(error))
        raise ConnectionError(f"MLflow at {shown(tracking_uri)}: {said}") from None


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: MlflowClient, name: str, identity: str) -> str | None:
    """The oldest version with that content whose folder is still there."""
    found = [entry for entry in _entries(client, name) if entry.tags.get(DIGEST_TAG) == identity]
    alive = [entry.version for entry in found if storage.list_names(entry.url)]
    return min(alive, key=int, default=None)


def _entries(client: MlflowClient, name: str | None = None) -> list[Entry]:
    """All versions that carry our digest, of one model or of all; pages are followed."""
    entries, token = [], None
    while True:
        page = client.search_model_versions(f"name='{name}'" if name else None, max_results=1000, page_token=token)
        for made in page:
            if DIGEST_TAG in made.tags:
                aliases = tuple(sorted(made.aliases))
                url = from_source(made.source or "")
                entries.append(Entry(made.name, str(made.version), aliases, url, dict(made.tags)))
        token = page.token
        if not token:
            return _with_aliases(client, entries)


def _with_aliases(client: MlflowClient, entries: list[Entry]) -> list[Entry]:
    """Aliases are kept with the model, not with what a search for versions returns."""
    held: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(entry.name for entry in entries):
        for alias, version in client.get_registered_model(name).aliases.items():
            held.setdefault((name, str(version)), []).append(alias)
    return [entry._replace(aliases=tuple(sorted(held.get((entry.name, entry.version), [])))) for entry in entries]


def _run(
    client: MlflowClient,
    name: str,
    identity: str,
    metrics: Mapping[str, float],
    params: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """Id of a finished MLflow run with parameters, metrics and curves. Left alone if the version cannot be made."""
    from mlflow.entities import Metric, Param

    experiment = _experiment(client)
    run = client.create_run(experiment, run_name=name, tags={DIGEST_TAG: identity})
    now = run.info.start_time
    rows = [Metric(metric_key(key), float(value), now, 0) for key, value in metrics.items() if _finite(value)]
    rows += [Metric(metric_key(key), value, now, step) for key, value, step in curve(history)]
    for start in range(0, len(rows), BATCH):
        client.log_batch(run.info.run_id, metrics=rows[start : start + BATCH])
    values = [Param(metric_key(key), str(value)[:6000]) for key, value in params.items()]
    for start in range(0, len(values), 100):
        client.log_batch(run.info.run_id, params=values[start : start + 100])
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT))
        except MlflowException:  # another process may have made it in between
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return str(found.experiment_id)


def curve(history: Iterable[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """(stage/field, value, step) of every finite number in the lines of metrics.jsonl; tasks become `task share`."""
    found = []
    for row in history:
        if not isinstance(row.get("step"), int):
            continue
        stage = str(row.get("stage", "train"))
        shares = row.get("tasks")
        flat = {
            **row,
            **({f"share/{task}": share for task, share in shares.items()} if isinstance(shares, dict) else {}),
        }
        found += [
            (f"{stage}/{key}", float(value), row["step"])
            for key, value in flat.items()
            if key != "step" and _finite(value)
        ]
    return found


def metric_key(name: str) -> str:
    """A name that every MLflow server takes: letters, digits, `_ - . /` and spaces, at most 250 long."""
    return re.sub(r"[^\w./ -]", "/", name).replace("//", "/").strip("/")[:250]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
