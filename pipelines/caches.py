"""`earloom cache list` and `prune`: what the feature caches of a lake take, who uses them, and which may go."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from components.features.evict import Cache, Policy, choose, list_caches, remove
from components.registry.graph import Graph, read_graph
from infra.storage import join
from infra.units import UNITS, volume

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
BYTES = {"B": 1, **UNITS, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def caches_of(graph: Graph) -> list[Cache]:
    """Every feature cache, with who uses it. Audio whose manifest is damaged counts as there."""
    audio = {f"{version.dataset}/{version.version}": version.digest for version in graph.audio}
    root = join(graph.lake, "audio") + "/"
    damaged = {gap.url.removeprefix(root): "" for gap in graph.gaps if gap.url.startswith(root)}
    return list_caches(graph.lake, damaged | audio, users(graph))


def silent(graph: Graph) -> list[str]:
    """Stages and runs that do not say, or not legibly, what they were made from."""
    known = {made.url for made in (*graph.stages.values(), *graph.runs) if made.record and made.record.data}
    root = join(graph.lake, "runs") + "/"
    return sorted({gap.url for gap in graph.gaps if gap.url.startswith(root)} - known)


def users(graph: Graph) -> dict[str, list[str]]:
    """Digest and place of each cache that a record names → stages and runs. A cache of units needs the features that
    its codebook was fitted on: to run again asks for them."""
    found: dict[str, list[str]] = {}
    for made in (*graph.stages.values(), *graph.runs):
        for link in made.record.features if made.record else ():
            book = graph.codebooks.get(link.codebook or "")
            for name in (link.digest, link.place, *((book.features,) if book else ())):
                found.setdefault(name, []).append(f"{made.arch}/{made.name}")
    return found


def show_caches(lake: str, as_json: bool = False) -> None:
    """All caches as a table, or as JSON."""
    from pipelines.progress import console

    caches = caches_of(read_graph(lake))
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in caches], ensure_ascii=False, indent=2))
        return
    console.print(_table([(one, _reached(one)) for one in caches], "reached by"), soft_wrap=True)
    console.print(f"{len(caches)} caches, {volume(sum(one.bytes for one in caches))}")


def prune(
    lake: str,
    older_than: str | None = None,
    larger_than: str | None = None,
    unreachable: bool = False,
    even_reachable: bool = False,
    yes: bool = False,
) -> list[Cache]:
    """Show what goes and what is kept; with `yes` remove it. Returns what goes, or went.

    ValueError for no limit, a wrong amount, or a stage or run that may need any cache, as it has no record.
    """
    from pipelines.progress import console

    policy = Policy(
        older_than=None if older_than is None else quantity(older_than, SECONDS, "--older-than 30d"),
        larger_than=None if larger_than is None else int(quantity(larger_than, BYTES, "--larger-than 10GB")),
        unreachable=unreachable,
        even_reachable=even_reachable,
    )
    graph = read_graph(lake)
    unknown = [] if even_reachable else silent(graph)
    if unknown:
        raise ValueError(
            f"{len(unknown)} stages or runs do not say which caches they use, such as {unknown[0]}: run them again or "
            "remove them, or add --even-reachable"
        )
    chosen = choose(caches_of(graph), policy)
    if chosen.kept:
        console.print(_table(chosen.kept, "kept because"), soft_wrap=True)
    if chosen.going:
        console.print(_table([(one, _reached(one)) for one in chosen.going], "goes, reached by"), soft_wrap=True)
    freed = 0
    for cache in chosen.going if yes else ():
        remove(cache)
        freed += cache.bytes
        console.print(f"  removed {cache.place}, {volume(cache.bytes)}", soft_wrap=True)
    total = sum(one.bytes for one in chosen.going)
    if yes:
        console.print(f"{len(chosen.going)} caches removed, {volume(freed)}; {volume(chosen.left)} stay")
    else:
        console.print(
            f"{len(chosen.going)} caches would go, {volume(total)}; {volume(chosen.left)} would stay. "
            "Nothing was removed: add --yes"
        )
    if policy.larger_than is not None and chosen.left > policy.larger_than:
        console.print(
            f"still {volume(chosen.left - policy.larger_than)} over {larger_than}: the rest is kept; "
            "--even-reachable takes caches in use too"
        )
    return chosen.going


def quantity(text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    """A number with its unit, `30d` or `10GB` → in seconds or bytes; ValueError that shows how it is written."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    found = {unit.lower(): value for unit, value in units.items()}.get(match[2].lower()) if match else None
    if match is None or found is None:
        raise ValueError(f"{text!r} is no amount: write it as in {example}; units are {', '.join(units)}")
    return float(match[1]) * found


def _reached(cache: Cache) -> str:
    if cache.removing:
        return "half removed"
    by = ["audio"] if cache.audio else []
    by += [f"{len(cache.used_by)} stages and runs, such as {cache.used_by[0]}"] if cache.used_by else []
    return " and ".join(by) or "nothing"


def _table(rows: Sequence[tuple[Cache, str]], last: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("encoder", "data set", "version", "cache"):
        table.add_column(column)
    for column in ("frames", "width", "size", "age"):
        table.add_column(column, justify="right")
    table.add_column("state")
    table.add_column(last)
    now = time.time()
    for one, text in rows:
        name = one.encoder if one.kind != "units" else f"{one.encoder} (units)"
        cells = [name, one.dataset, one.version, one.place.partition("/")[0]]
        cells += [f"{one.frames:,}", str(one.width), volume(one.bytes), _age(now - one.modified)]
        table.add_row(*(escape(cell) for cell in (*cells, "finished" if one.finished else "unfinished", text)))
    return table


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
