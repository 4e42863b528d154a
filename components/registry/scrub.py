"""What of this machine stands in a model's folder and is nobody else's business: paths, names, secrets."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.registry.card import plain
from infra import secrets

# A path of this machine, as a whole text: with two names at least, as "/think" may be a word of a prompt.
LOCAL = re.compile(r"(?:file|local)://[^\n]+|~[\w-]*/[^\n]+|/[^/\n]+/[^\n]*|[A-Za-z]:\\[^\n]+")
STORE = re.compile(r"(?!https?://|hf://)[a-z][a-z0-9+.]*://[^\n]+")  # a private store, such as s3://bucket/lake
URL = re.compile(r"\w+://\S+")
HEADER = 100_000_000  # bytes that the header of a safetensors file has at most


class Scrubber:
    """Replaces paths by the last of their names, remembers which, and does the same in texts that quote them."""

    def __init__(self, private: Iterable[str] = ()) -> None:
        self.private = [text.rstrip("/") for text in private if len(text.strip("/~.")) > 2]
        self.replaced: dict[str, str] = {}

    def value(self, value: Any) -> Any:
        """A JSON or YAML value without them."""
        if isinstance(value, dict):
            return {self.value(key): self.value(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        return self._text(value) if isinstance(value, str) else value

    def prose(self, text: str) -> str:
        """A text for people, in which what was replaced before may be quoted, also as Markdown escapes it."""
        for old, new in sorted(self.replaced.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(old, new).replace(plain(old), plain(new))
        return secrets.redacted(self._without_places(text))

    def _without_places(self, text: str) -> str:
        for place in self.private:
            text = text.replace(f"{place}/", "").replace(place, "…")
        return text

    def _text(self, text: str) -> str:
        if LOCAL.fullmatch(text) or STORE.fullmatch(text):
            name = re.split(r"[/\\]", secrets.redacted(text).rstrip("/\\"))[-1] or "local"
            self.replaced[text] = name
            return name
        text = self._without_places(text)
        return secrets.redacted(text) if URL.fullmatch(text) else text  # a prompt stays as it is, to the letter


def private_places(lake: str) -> list[str]:
    """The lake, the home folder, user and host of this machine, as they may stand in a file."""
    places = [lake]
    with suppress(RuntimeError):
        places.append(str(Path.home()))
    with suppress(OSError, KeyError):
        places.append(f"{getpass.getuser()}@{socket.gethostname()}")
    return [place for place in places if place not in ("", "/")]


def refuse_private(folder: Path, places: Iterable[str]) -> None:
    """ValueError that names the file if one of them, a login or a secret is left in a folder; never the secret."""
    known = [(place, re.compile(rf"{re.escape(place.rstrip('/'))}(?![\w-])")) for place in places if len(place) > 2]
    hidden = set(secrets.values())
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        text = header_of(path) if path.suffix == ".safetensors" else path.read_text(errors="replace")
        found = [place for place, pattern in known if pattern.search(text)]
        if any(value in text for value in hidden) or secrets.KNOWN.search(text):
            found.append("a secret")
        if path.name not in ("tokenizer.json", "vocab.json", "merges.txt") and secrets.LOGIN.search(text):
            found.append("a login in a URL")
        if found:
            raise ValueError(f"{path.name} tells {found[0]}, which nobody else should read: it is not exported")


def header_of(path: Path) -> str:
    """The header of a safetensors file, which is JSON. ValueError if it has none, or holds an optimizer's state."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER, path.stat().st_size):
            raise ValueError(f"{path.name} is no safetensors file")
        text = file.read(length).decode(errors="replace")
    try:
        names = json.loads(text)
    except ValueError:
        raise ValueError(f"{path.name} is no safetensors file") from None
    if states := [name for name in names if re.search(r"exp_avg|optimi[sz]er|momentum_buffer", name)]:
        raise ValueError(f"{path.name} holds the state of an optimizer ({states[0]}): it is not exported")
    return text
