"""MLflow as a catalogue of model folders: names, versions, aliases, metrics. It never stores or loads a model.

A version points at a folder (transformers layout, safetensors) at any fsspec URL; what is loaded is always that
folder, by us. The catalogue is an sqlite file beside the lake, or any MLflow server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from components.digest import digest
from components.registry.mlflow_client import connected, shown
from components.registry.mlflow_run import curve, finished_run, metric_key
from components.registry.names import check_alias, check_name, parse_model
from infra import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["catalogue", "check_alias", "check_name", "curve", "find", "metric_key", "parse_model", "register", "shown"]

LOCAL = "local://"
DIGEST_TAG = "earloom.digest"


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
    created: float = 0.0  # seconds since 1970


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
    with connected(tracking_uri) as client:
        _create_model(client, name)
        existing = _version_of(client, name, identity)
        if existing is None:
            run_id = finished_run(client, name, {DIGEST_TAG: identity}, metrics, params or {}, history)
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
    entry = find_entry(model, tracking_uri)
    return Found(entry.url, entry.version, entry.tags)


def find_entry(model: str, tracking_uri: str) -> Entry:
    """As `find`, with name, aliases and time."""
    with connected(tracking_uri) as client:
        return entry_of(client, model, tracking_uri)


def entry_of(client: MlflowClient, model: str, tracking_uri: str) -> Entry:
    """As `find_entry`, for a client that is there already."""
    name, alias, version = parse_model(model)
    entries = [entry for entry in entries_of(client, name) if entry.name == name]
    if not entries:
        known = ", ".join(sorted({entry.name for entry in entries_of(client)})) or "none yet"
        raise LookupError(f"no model named {name!r} in {shown(tracking_uri)}; there are: {known}")
    matching = [entry for entry in entries if alias in (None, *entry.aliases) and version in (None, entry.version)]
    if not matching:
        there = ", ".join("".join([entry.version, *(f" @{a}" for a in entry.aliases)]) for entry in entries)
        wanted = f"alias @{alias}" if alias else f"version {version}"
        raise LookupError(f"model {name!r} has no {wanted}; its versions are: {there}")
    return max(matching, key=lambda entry: int(entry.version))


def catalogue(tracking_uri: str) -> list[Entry]:
    """Every version of every model that Earloom registered, by name, newest first."""
    with connected(tracking_uri) as client:
        return sorted(entries_of(client), key=lambda entry: (entry.name, -int(entry.version)))


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


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: MlflowClient, name: str, identity: str) -> str | None:
    """The oldest version with that content whose folder is still there."""
    found = [entry for entry in entries_of(client, name) if entry.tags.get(DIGEST_TAG) == identity]
    alive = [entry.version for entry in found if storage.list_names(entry.url)]
    return min(alive, key=int, default=None)


def entries_of(client: MlflowClient, name: str | None = None) -> list[Entry]:
    """All versions that carry our digest, of one model or of all; pages are followed."""
    entries, token = [], None
    while True:
        page = client.search_model_versions(f"name='{name}'" if name else None, max_results=1000, page_token=token)
        for made in page:
            if DIGEST_TAG in made.tags:
                aliases = tuple(sorted(made.aliases))
                url, created = from_source(made.source or ""), (made.creation_timestamp or 0) / 1000
                entries.append(Entry(made.name, str(made.version), aliases, url, dict(made.tags), created))
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
