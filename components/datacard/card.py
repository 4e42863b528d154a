"""The card of a finished audio data set: one HTML file that says what is in it and plays some of it.

What is counted is in `facts`, how it looks in `page` and `plots`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from components.datacard.facts import choose, read_rejects
from components.datacard.page import Contents, Example, card_page
from components.schema import SAMPLE_RATE, AudioManifest
from components.seal import read_sealed
from components.shards.arrays import rows_at
from components.shards.checks import CHECKS, Report
from components.shards.index import MANIFEST, MEASURES, REJECTS, read_index, read_manifest
from components.shards.reader import ShardReader
from infra.storage import exists, join, read_bytes, write_text

CARD = "card.html"
EXAMPLES = 8
LONGEST = 600.0  # seconds of the longest clip that is opened for an example
HEARD = 10.0  # seconds of it that the page plays
PLACES = ("shard", "audio_offset", "audio_size", "json_offset", "json_size", "audio_digest")  # what the reader needs
COUNTED = ("key", "seconds", "samples", "text_length", "language", "speaker", "gender", "split", "labels", "marks")


def card(root_url: str) -> str:
    """The page of the data set at `root_url`, at most 3 MB; the same data set gives the same page.

    FileNotFoundError if the data set is not finished, ValueError if its index, rejects or checks are damaged. A
    damaged shard is said on the page, where its example would be.
    """
    manifest = read_manifest(root_url)
    table = read_index(root_url, (*PLACES, *COUNTED, *MEASURES))
    url = join(root_url, REJECTS)
    rejects = read_rejects(read_bytes(url) if exists(url) else b"", url)
    reader = ShardReader(root_url)
    examples = [_example(reader, row) for row in choose_rows(table)]
    return card_page(Contents(manifest, table, rejects, find_checks(root_url, manifest), examples))


def write_card(root_url: str) -> str:
    """Write `card.html` beside the manifest and return its URL. Raises as `card`."""
    url = join(root_url, CARD)
    write_text(url, card(root_url))
    return url


def choose_rows(table: pa.Table, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Rows of the index for the examples, by split, language and duration."""
    order = {"train": 0, "dev": 1, "test": 2}
    rows: list[dict[str, Any]] = table.take(rows_at(np.array(choose(table, count, LONGEST), int))).to_pylist()
    return sorted(rows, key=lambda row: (order.get(row["split"], 3), row["language"] or "", row["seconds"], row["key"]))


def find_checks(root_url: str, manifest: AudioManifest) -> dict[str, Any]:
    """`duplicates` and `leaks` as ingest noted them beside the manifest or in it; empty if nothing was looked for.

    ValueError if what it noted is damaged.
    """
    url = join(root_url, CHECKS)
    if not exists(url):
        found = manifest.config.get("checks", manifest.config)
        return found if isinstance(found, dict) else {}
    try:
        return read_sealed(url, Report).model_dump(exclude={"seal"})
    except ValueError as error:
        raise ValueError(f"{error}: remove {join(root_url, MANIFEST)} and ingest again, shards are kept") from error


def _example(reader: ShardReader, row: dict[str, Any]) -> Example:
    try:
        samples = reader.waveform(row)[: int(HEARD * SAMPLE_RATE)].copy()  # so that the rest is let go
        return Example(row, reader.clip(row), samples)
    except (ValueError, FileNotFoundError) as error:
        return Example(row, fault=str(error))
