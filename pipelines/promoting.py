"""`earloom promote`, `rollback` and `models`: which version of a model holds an alias, why, and what else there is."""

from __future__ import annotations

import getpass
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.registry.alias_history import History, Move, back_to, make_move, move_alias, read_history
from components.registry.evaluation_record import EVALUATION, Evaluation, read_evaluation
from components.registry.mlflow_client import connected, shown
from components.registry.mlflow_registry import Entry, catalogue, entries_of, entry_of
from components.registry.model_folder import checked
from components.registry.names import check_alias, check_name
from components.registry.promotion import NotComparable, Verdict, compare
from infra import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient


class FallsShort(RuntimeError):
    """The candidate is not better by the margin; the message says by how much it falls short."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.said())
        self.verdict = verdict


class Gate(NamedTuple):
    """What a candidate has to pass, and what is said of it."""

    metric: str | None = None
    margin: float = 0.005
    relative: bool = False
    why: str = ""
    force: bool = False


class Outcome(NamedTuple):
    """What became of a promotion; `move` is None for a dry run, and where the version held the alias before."""

    entry: Entry
    move: Move | None
    verdict: Verdict | None
    doubt: str = ""  # why a forced move would have been refused


def promote(model: str, alias: str, gate: Gate, tracking_uri: str, dry_run: bool = False) -> Outcome:
    """Give the alias to a version if it is better than the one that holds it, on the same clips of the same data.

    FallsShort or NotComparable if it may not; ValueError if its folder was changed since it was registered; Raced if
    somebody else moved the alias in the meantime.
    """
    check_alias(alias)
    if gate.force and not gate.why.strip():
        raise ValueError("--force needs --why: say why a version is promoted that would have been refused")
    with connected(tracking_uri) as client:
        entry = entry_of(client, model, tracking_uri)
        checked(entry)
        mine = read_evaluation(entry.url)
        made: dict[str, Any] = {}

        def decide(history: History) -> Move:
            made["verdict"], made["doubt"] = _judge(client, entry, mine, history.holder, gate)
            facts = _facts(made["verdict"], gate, made["doubt"])
            return make_move("promote", entry.version, history.holder, who(), gate.why, facts)

        seen = read_history(client, entry.name, alias)
        if seen.holder == entry.version:
            return Outcome(entry, None, None)
        if dry_run:
            decide(seen)
        move = None if dry_run else move_alias(client, entry.name, alias, decide)
    return Outcome(entry, move, made["verdict"], made["doubt"])


def rollback(name: str, alias: str, why: str, tracking_uri: str) -> tuple[Move, list[str]]:
    """Give the alias back to the version that held it before; also the versions passed over, as they are gone.

    LookupError if there is none; ValueError if its folder was changed; Raced as above.
    """
    check_alias(alias)
    check_name(name)
    gone: list[str] = []
    with connected(tracking_uri) as client:
        entries = entries_of(client, entry_of(client, name, tracking_uri).name)

        def decide(history: History) -> Move:
            entry, gone[:] = back_to(history, entries, alias)
            checked(entry)
            return make_move("rollback", entry.version, history.holder, who(), why)

        return move_alias(client, name, alias, decide), gone


def history_of(name: str, alias: str, tracking_uri: str) -> History:
    """The moves of an alias."""
    with connected(tracking_uri) as client:
        return read_history(client, entry_of(client, name, tracking_uri).name, alias)


def rows(name: str | None, tracking_uri: str) -> list[dict[str, Any]]:
    """What `earloom models` shows: a row a version. LookupError if there is no such model."""
    if name is not None:
        check_name(name)
    found = [entry for entry in catalogue(tracking_uri) if name in (None, entry.name)]
    if name is not None and not found:
        known = ", ".join(sorted({entry.name for entry in catalogue(tracking_uri)})) or "none yet"
        raise LookupError(f"no model named {name!r} in {shown(tracking_uri)}; there are: {known}")
    return [_row(entry) for entry in found]


def registry_uri(lake: str, given: str | None) -> str:
    """The registry of a lake. LookupError where there is none: an empty one must not be made by looking."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri and not storage.is_local(lake):
        raise LookupError(
            f"the lake {shown(lake)} is remote: name an MLflow server, --tracking-uri or $MLFLOW_TRACKING_URI"
        )
    uri = uri or f"sqlite:///{storage.local_path(lake).resolve()}/mlflow.db"
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).exists():
        raise LookupError(f"no registry at {file}: nothing was registered there; name another --lake or --tracking-uri")
    return uri


def who() -> str:
    """$EARLOOM_USER, or user@host."""
    if given := os.environ.get("EARLOOM_USER", "").strip():
        return given[:200]
    user = "unknown"
    with suppress(OSError, KeyError):  # a container may run under a number that has no name
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _judge(
    client: MlflowClient, entry: Entry, mine: Evaluation | None, holder: str | None, gate: Gate
) -> tuple[Verdict | None, str]:
    """The verdict; with --force also why there would have been a refusal."""
    try:
        if mine is None:
            raise NotComparable(
                f"{entry.name}/{entry.version} has no record of an evaluation: evaluate it and register it again"
            )
        theirs = None if holder is None else _incumbent(client, entry.name, holder)
        against = f"version {holder}"
        verdict = compare(mine, theirs, gate.metric, gate.margin, gate.relative, against)
    except NotComparable as error:
        if not gate.force:
            raise
        return None, str(error)
    if verdict.passed:
        return verdict, ""
    if not gate.force:
        raise FallsShort(verdict)
    return verdict, verdict.said()


def _incumbent(client: MlflowClient, name: str, version: str) -> Evaluation:
    """What the version that holds the alias was measured on; it must be what was registered."""
    entries = [one for one in entries_of(client, name) if one.version == version]
    try:
        if not entries:
            raise FileNotFoundError(f"version {version} of {name} was not registered by Earloom")
        checked(entries[0], EVALUATION)
        found = read_evaluation(entries[0].url)
    except (OSError, ValueError) as error:
        raise NotComparable(f"{error}; or promote with --force and --why") from error
    if found is None:
        raise NotComparable(
            f"{name}/{version} holds the alias and has no record of an evaluation: evaluate and register it again, or "
            "promote with --force and --why"
        )
    return found


def _facts(verdict: Verdict | None, gate: Gate, doubt: str) -> dict[str, str]:
    """What decided, as tags."""
    facts = {"forced": f"yes: {doubt}"[:1000]} if doubt else {"forced": "no"}
    facts |= {"margin": f"{gate.margin:g}{' relative' if gate.relative else ''}"}
    if verdict is None:
        return facts
    interval = "unknown" if verdict.interval is None else f"{verdict.interval[0]:+.5f} {verdict.interval[1]:+.5f}"
    return facts | {
        "metric": verdict.metric,
        "value": f"{verdict.value:.6g}",
        "against": verdict.against,
        "against.value": f"{verdict.other:.6g}",
        "gain": f"{verdict.gain:.6g}",
        "gain.interval": interval,
        "clips": str(verdict.clips),
    }


def _row(entry: Entry) -> dict[str, Any]:
    tags = entry.tags
    return {
        "name": entry.name,
        "version": entry.version,
        "aliases": list(entry.aliases),
        "architecture": tags.get("architecture"),
        "preset": tags.get("preset"),
        "metric": tags.get("metric"),
        "value": float(tags["value"]) if "value" in tags else None,
        "data": tags.get("data"),
        "registered": datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="seconds"),
        "url": entry.url,
    }
