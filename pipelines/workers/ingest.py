"""Ingest actors: one group of recordings into one shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from components.shards.ingest import ingest_group
from components.shards.settings import Ingest
from infra import storage


def ingester(root: str, data: str, settings: Ingest) -> Callable[[tuple[int, list[Any]]], Any]:
    """Work of an ingest actor: one group of recordings into one shard."""
    return lambda item: ingest_group(item[0], item[1], root, data, settings)


def careful_ingester(
    root: str, data: str, settings: Ingest, trying: str, refused: dict[str, str]
) -> Callable[[tuple[int, list[Any]]], Any]:
    """As `ingester`, but every file is noted at `trying` before it is decoded, and `refused` ones are set aside."""

    def note(key: str) -> None:
        storage.write_text(trying, key)

    return lambda item: ingest_group(item[0], item[1], root, data, settings, refused, note)
