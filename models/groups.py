"""Groups of parameters that a freeze plan may name."""

from __future__ import annotations

import re
from collections.abc import Iterable

GROUPS = ("connector", "lora", "embeddings", "llm", "encoder", "codebook")
VIEWS = {"norms": re.compile(r"norm|\bln_|layernorm", re.IGNORECASE), "biases": re.compile(r"\.bias$")}
OWN = {"encoders": "encoder", "llm": "llm"}  # first part of a name -> group; others are called as they are
EMBEDDINGS = re.compile(r"\b(embed_tokens|lm_head|shared|wte)\b")


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameter names by group; each name is in one. Groups beyond `GROUPS` are an architecture's own modules."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        groups.setdefault(_group_of(name), []).append(name)
    return groups


def names_of(groups: dict[str, list[str]], train: tuple[str, ...]) -> set[str]:
    """The parameters that a freeze plan lets learn: `llm` has the embeddings with it, `norms` and `biases` are parts of
    the backbone's.

    Raises ValueError for a group without parameters.
    """
    found: set[str] = set()
    for group in {*train, *(["embeddings"] if "llm" in train else [])}:
        members = [n for n in groups["llm"] if VIEWS[group].search(n)] if group in VIEWS else groups.get(group)
        if not members or group == "codebook":
            there = ", ".join(name for name, members in groups.items() if members and name != "codebook")
            raise ValueError(f"no parameters in group {group!r}; it has: {there}")
        found.update(members)
    return found


def _group_of(name: str) -> str:
    if re.search(r"\.lora_", name):
        return "lora"
    first = name.partition(".")[0]
    group = OWN.get(first, first)
    return "embeddings" if group == "llm" and EMBEDDINGS.search(name) else group
