"""Who held an alias, and why it moved: tags of the registered model, which MLflow keeps, in sqlite or on a server.

MLflow sets an alias without comparing it with anything. So whoever moves one writes a claim first: a tag with the next
number and letters of its own. Of two who claim at once the second sees the first, and withdraws.
"""

from __future__ import annotations

import random
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, ValidationError

from components.registry.mlflow_registry import Entry, entries_of
from components.schema import Strict

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "earloom.moves"
TRIES = 6  # of two who claim at the same time
WORDS = 1000  # letters of a reason that are kept
STALE = 60.0  # seconds after which a claim is that of a process that died


class Raced(RuntimeError):
    """Somebody else moved the alias in the meantime."""


class Move(Strict):
    """An alias went from one version to another. `facts` are what decided it: metric, value, margin, …"""

    action: Literal["promote", "rollback"]
    to: str
    by: str
    when: str  # UTC, ISO 8601
    why: str = ""
    before: str | None = None  # the version that held it
    facts: dict[str, str] = Field(default_factory=dict)
    state: Literal["claimed", "done"] = "claimed"


class History(NamedTuple):
    """The moves of an alias in their order, and the version that holds it now."""

    moves: tuple[Move, ...]
    holder: str | None
    last: int  # number of the last move or claim

    def holders(self) -> list[str]:
        """The versions that a rollback can go back through, oldest first; the last holds the alias now."""
        stack: list[str] = []
        for move in self.moves:
            if move.before and (not stack or stack[-1] != move.before):
                stack.append(move.before)  # it was moved by hand in between
            if move.action == "promote":
                stack.append(move.to)
            elif move.to in stack:
                del stack[len(stack) - stack[::-1].index(move.to) :]
            else:
                stack = [move.to]
        if self.holder and (not stack or stack[-1] != self.holder):
            stack.append(self.holder)
        return stack


def read_history(client: MlflowClient, name: str, alias: str) -> History:
    """The history of an alias of a model; ValueError if a tag of ours cannot be read."""
    model = client.get_registered_model(name)
    numbered = _records(model.tags, alias)
    done = [move for _, move in sorted(numbered.items()) if move.state == "done"]
    holder = model.aliases.get(alias)
    last = max((_number(key) for key in numbered), default=0)
    return History(tuple(done), None if holder is None else str(holder), last)


def move_alias(client: MlflowClient, name: str, alias: str, decide: Callable[[History], Move]) -> Move:
    """Give the alias to `decide(history).to`, record it, and return what was recorded.

    `decide` is asked again where somebody else claimed at the same time. Raises Raced if the alias went to another
    version in the meantime; the exceptions of `decide` leave everything as it was.
    """
    seen = read_history(client, name, alias)
    for attempt in range(TRIES):
        move = decide(seen)
        if move.before != seen.holder:
            raise ValueError(f"@{alias} is held by {seen.holder}, not by {move.before}")
        key = f"{PREFIX}.{alias}.{seen.last + 1:06d}.{uuid.uuid4().hex[:8]}"
        client.set_registered_model_tag(name, key, move.model_dump_json())
        now = read_history(client, name, alias)
        if now.holder == seen.holder and not _others(client, name, alias, key):
            return _settle(client, name, alias, key, move)
        client.delete_registered_model_tag(name, key)
        time.sleep(random.uniform(0.1, 0.4) * (attempt + 1))
        now = read_history(client, name, alias)
        if now.holder != seen.holder:
            raise Raced(_raced(name, alias, seen.holder, now))
        seen = now
    raise Raced(f"others are moving @{alias} of {name} at the same time: wait for them and try again")


def _settle(client: MlflowClient, name: str, alias: str, key: str, move: Move) -> Move:
    client.set_registered_model_alias(name, alias, move.to)
    now = read_history(client, name, alias)
    if now.holder != move.to:  # by somebody who writes no claims
        client.delete_registered_model_tag(name, key)
        raise Raced(_raced(name, alias, move.to, now))
    done = move.model_copy(update={"state": "done"})
    client.set_registered_model_tag(name, key, done.model_dump_json())
    _mark(client, name, alias, done)
    return done


def _mark(client: MlflowClient, name: str, alias: str, move: Move) -> None:
    """The same for people, as tags of the two versions."""
    base = f"earloom.{alias}"
    said = {"action": move.action, "by": move.by, "when": move.when, "why": move.why}
    taken = said | {"over": move.before or "none"} | move.facts
    for tag, value in taken.items():
        client.set_model_version_tag(name, move.to, f"{base}.{tag}", value)
    if move.before and move.before in {entry.version for entry in entries_of(client, name)}:
        for tag, value in (said | {"version": move.to}).items():
            client.set_model_version_tag(name, move.before, f"{base}.displaced.{tag}", value)


def make_move(
    action: Literal["promote", "rollback"],
    to: str,
    before: str | None,
    by: str,
    why: str,
    facts: dict[str, str] | None = None,
) -> Move:
    """A move that begins now."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return Move(action=action, to=to, before=before, by=by, when=when, why=why[:WORDS] or "not said", facts=facts or {})


def back_to(history: History, entries: list[Entry], alias: str) -> tuple[Entry, list[str]]:
    """The version that a rollback goes to, and those before the present one that are no longer registered.

    LookupError if there is none.
    """
    there = {entry.version: entry for entry in entries}
    if history.holder is None:
        raise LookupError(f"nothing holds @{alias}: `earloom promote` gives it to a version")
    gone: list[str] = []
    for version in reversed(history.holders()[:-1]):
        if version in there:
            return there[version], gone
        gone.append(version)
    raise LookupError(f"no version held @{alias} before {history.holder}: promote another one instead")


def _records(tags: dict[str, str], alias: str) -> dict[str, Move]:
    found = {}
    for key, value in tags.items():
        if re.fullmatch(rf"{re.escape(PREFIX)}\.{re.escape(alias)}\.\d+\.[0-9a-f]{{8}}", key):
            try:
                found[key] = Move.model_validate_json(value)
            except ValidationError as error:
                raise ValueError(f"the tag {key} of the model cannot be read: {error.errors()[0]['msg']}") from None
    return found


def _others(client: MlflowClient, name: str, alias: str, key: str) -> bool:
    """Whether somebody else is moving the alias, or has since the claim `key` was written."""
    claims = _records(client.get_registered_model(name).tags, alias)
    del claims[key]
    since = datetime.now(UTC) - timedelta(seconds=STALE)
    pending = (one for one in claims.values() if one.state == "claimed" and datetime.fromisoformat(one.when) > since)
    return any(_number(other) >= _number(key) for other in claims) or any(pending)


def _number(key: str) -> int:
    return int(key.rsplit(".", 2)[1])


def _raced(name: str, alias: str, seen: str | None, now: History) -> str:
    last = now.moves[-1] if now.moves and now.moves[-1].to == now.holder else None
    who = f" by {last.by} at {last.when}" if last else ""
    return (
        f"@{alias} of {name} was moved in the meantime, from {seen or 'nothing'} to {now.holder or 'nothing'}{who}: "
        "nothing was changed here; compare with that version and try again"
    )
