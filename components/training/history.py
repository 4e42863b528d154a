"""The metrics of a stage, written piece by piece, so that a checkpoint costs the same at any step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from infra import storage

METRICS = "metrics.jsonl"
SEGMENTS = "metrics"  # folder of the lines between two checkpoints


def write_segment(url: str, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """The lines since the last checkpoint, before the checkpoint at `step` is written."""
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        storage.write_text(storage.join(url, SEGMENTS, f"{step:010d}.jsonl"), text)


def join_segments(url: str, last: int) -> None:
    """Make `metrics.jsonl` of all pieces up to a step; later ones are of an attempt whose checkpoint was lost.

    Such an attempt may have ended a piece elsewhere: of two lines of a step, that of the longer piece counts.
    """
    folder = storage.join(url, SEGMENTS)
    names = [name for name in storage.list_names(folder) if int(name.partition(".")[0]) <= last]
    lines: dict[int, str] = {}
    for name in names:
        written = storage.read_text(storage.join(folder, name)).splitlines(keepends=True)
        lines |= {json.loads(line)["step"]: line for line in written}
    storage.write_text(storage.join(url, METRICS), "".join(lines[step] for step in sorted(lines)))


def read_metrics(url: str) -> list[dict[str, Any]]:
    """The metric lines of a stage, empty for one that learnt nothing."""
    metrics = storage.join(url, METRICS)
    return [json.loads(line) for line in storage.read_text(metrics).splitlines()] if storage.exists(metrics) else []
