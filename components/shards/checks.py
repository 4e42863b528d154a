"""What only the whole data set can show: clips that are in it twice, and what its splits have in common.

Clips that are dropped go from the index, and so from all that is trained and measured; the shards keep their bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from components.schema import Reject, Strict, slim
from components.shards.arrays import mask, rows_at
from components.shards.duplicates import Group, exact_duplicates, linked, near_duplicates
from components.shards.leaks import Leak, find_leaks, rows_to_set_aside
from components.shards.settings import Ingest

CHECKS = "checks.json"  # beside the manifest
EXAMPLES = 5


class Report(Strict):
    """`checks.json`: what was found, None where it was not looked for."""

    leaks: list[dict[str, Any]] | None = None  # by kind and pair of splits
    duplicates: dict[str, Any] | None = None
    seal: str = ""  # see components/seal.py


class Checked(NamedTuple):
    """The index without what was dropped, a reject for each clip that was, and what `checks.json` tells."""

    table: pa.Table
    rejects: list[Reject]
    report: Report


def check(table: pa.Table, settings: Ingest) -> Checked:
    """Look for duplicates and leaks as the settings say. ValueError if leaks are refused and there are some."""
    report: dict[str, Any] = {}
    rejects: list[Reject] = []
    asked = (settings.leak_speakers, settings.leak_sentences)
    near = near_duplicates(table) if settings.duplicates == "near" else []
    if settings.leaks != "ignore":
        leaks = find_leaks(table, *asked, near)
        report["leaks"] = _counted(leaks)
        if leaks and settings.leaks == "refuse":
            raise ValueError(_refusal(leaks))
    if settings.duplicates != "keep":
        groups = {"the same samples as": exact_duplicates(table), "the same recording as": linked(near)}
        report["duplicates"] = _told(*groups.values())
        reasons = {
            row: f"{what} {group.keys[0]}, which is kept"
            for what, found in groups.items()
            for group in found
            for row in group.rows[1:]
        }
        rejects += _rejects(table, reasons, "duplicate")
        table = _without(table, reasons)
    if settings.leaks == "drop":
        reasons = rows_to_set_aside(table, *asked)
        rejects += _rejects(table, reasons, "leak")
        table = _without(table, reasons)
    return Checked(table, rejects, Report(**report))


def _without(table: pa.Table, rows: Collection[int]) -> pa.Table:
    if not rows:
        return table
    keep = np.ones(table.num_rows, dtype=bool)
    keep[list(rows)] = False
    return table.filter(mask(keep))


def _rejects(table: pa.Table, reasons: dict[int, str], step: str) -> list[Reject]:
    told = table.select(["original", "id"]).take(rows_at(np.array(list(reasons), np.int64))).to_pylist()
    return [
        slim(Reject(original=row["original"], id=row["id"], reason=reason, step=step))
        for row, reason in zip(told, reasons.values(), strict=True)
    ]


def _told(exact: Sequence[Group], near: Sequence[Group]) -> dict[str, Any]:
    return {
        "exact": sum(len(group.rows) - 1 for group in exact),
        "near": sum(len(group.rows) - 1 for group in near),
        "examples": [list(group.keys[:EXAMPLES]) for group in [*exact[:EXAMPLES], *near[:EXAMPLES]]],
    }


def _counted(leaks: Sequence[Leak]) -> list[dict[str, Any]]:
    """Leaks by kind and pair of splits, with the first examples of each."""
    alike: dict[tuple[str, tuple[str, str]], list[Leak]] = {}
    for leak in leaks:
        alike.setdefault((leak.kind, leak.splits), []).append(leak)
    return [
        {
            "kind": kind,
            "splits": list(splits),
            "count": len(found),
            "examples": [f"{leak.keys[0]} and {leak.keys[1]}" for leak in found[:EXAMPLES]],
        }
        for (kind, splits), found in sorted(alike.items())
    ]


def _refusal(leaks: Sequence[Leak]) -> str:
    first = leaks[0]
    return (
        f"{len(leaks)} leaks between splits, for example the {first.kind} of {first.keys[0]} ({first.splits[0]}) and "
        f"{first.keys[1]} ({first.splits[1]}): correct the splits, or take ingest.leaks=drop or report"
    )
