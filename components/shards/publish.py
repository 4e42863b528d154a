"""The last step of ingest: parts to one index, one list of rejects and, last and once, the manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from components.digest import digest, digest_bytes
from components.schema import AudioManifest, Recording, Reject, ShardInfo
from components.seal import sealed, unsealed
from components.shards.arrays import numbers
from components.shards.checks import CHECKS, check
from components.shards.group import PER_SHARD, Keyed
from components.shards.index import INDEX, MANIFEST, REJECTS, SCHEMA, find_manifest, table_bytes, to_table
from components.shards.ingest import ingest_config
from components.shards.parts import Part, digest_of_rows, finished_part, group_digest, identity_of, shard_name
from components.shards.samples import DEFAULTS
from components.shards.settings import Ingest
from infra.storage import exists, has_size, join, publish_bytes, read_bytes, shown, write_bytes

THREADS = 16  # shards that are asked for at once
READ = 4  # records of parts that are read at once: each takes some 5 MB while it is
TOGETHER = 16  # parts whose rows become one table
MAX_SOURCES = 100  # that a manifest lists
NO_ROWS = to_table([])


class Collated(NamedTuple):
    """A part, in little memory."""

    shard: ShardInfo | None
    table: pa.Table
    rows: str  # digest of the rows
    rejects: tuple[Reject, ...]
    sources: dict[str, int]
    licences: dict[str, int]


def audio_root(lake: str, dataset: str, version: str) -> str:
    """`<lake>/audio/<dataset>/<version>`."""
    return join(lake, "audio", dataset, version)


def dataset_version(
    recordings: Iterable[Recording], rejects: Iterable[Reject], config: dict[str, Any], data_url: str = ""
) -> str:
    """12 hex digits that are known before any work: digest of what was found, what was set aside and the configuration.

    With `data_url` the place of the data does not matter.
    """
    total = hashlib.sha256(digest(config).encode())
    for recording in recordings:
        total.update(digest(identity_of(recording, data_url)).encode())
    for reject in rejects:
        total.update(digest(reject.model_dump()).encode())
    return total.hexdigest()[:12]


def publish(
    root_url: str,
    dataset: str,
    version: str,
    groups: Sequence[Sequence[Keyed]],
    rejects: Sequence[Reject],
    data_url: str,
    per_shard: int = PER_SHARD,
    settings: Ingest = DEFAULTS,
) -> AudioManifest:
    """Collate the parts of all groups, in order, into `samples.parquet`, `rejects.jsonl`, `checks.json` and, last,
    `manifest.json`.

    `rejects` are those of the steps before; duplicates and leaks are looked for here, over the whole data set. May be
    called again: the manifest that is there is returned. ValueError if parts are missing, nothing could be used,
    leaks are refused and there are some, or the data set was published from other shards.
    """
    tables, found = _collated_all(root_url, groups, data_url, settings)
    table, doubled, checks = check(_together(tables), settings)
    aside = [*rejects, *(reject for part in found for reject in part.rejects), *doubled]
    config = ingest_config(per_shard, settings)
    index = table_bytes(table)
    manifest = _manifest(dataset, version, found, table, index, aside, config, data_url)
    _same(root_url, manifest)
    write_bytes(join(root_url, REJECTS), "".join(reject.model_dump_json() + "\n" for reject in aside).encode())
    if not table.num_rows:
        raise ValueError(
            f"none of {len(aside)} inputs could be used, for example {_example(aside)}; "
            f"all reasons are in {join(root_url, REJECTS)}"
        )
    write_bytes(join(root_url, INDEX), index)
    write_bytes(join(root_url, CHECKS), sealed(checks, indent=2))
    data = sealed(manifest, indent=2)
    if not publish_bytes(join(root_url, MANIFEST), data):
        before = _same(root_url, manifest)
        if before is not None and before.index_sha256 == manifest.index_sha256:
            return before
        write_bytes(join(root_url, MANIFEST), data)  # a lost index, made again by another pyarrow: other bytes
    return unsealed(data, AudioManifest, MANIFEST)


def _collated_all(
    root_url: str, groups: Sequence[Sequence[Keyed]], data_url: str, settings: Ingest
) -> tuple[list[pa.Table], list[Collated]]:
    """The rows of all parts in a few tables, and the parts without them. ValueError if parts are missing."""
    tables, found, missing = [NO_ROWS], [], []
    with ThreadPoolExecutor(READ) as pool:
        for start in range(0, len(groups), TOGETHER):
            some = range(start, min(start + TOGETHER, len(groups)))
            parts = list(pool.map(lambda i: _collated(root_url, i, groups[i], data_url, settings), some))
            there = [part for part in parts if part is not None]
            missing += [shard_name(i) for i, part in zip(some, parts, strict=True) if part is None]
            # Copied, because the small buffers of a part take twice the room of what is in them.
            tables.append(pa.concat_tables([NO_ROWS, *(part.table for part in there)]).combine_chunks())
            found += [part._replace(table=NO_ROWS) for part in there]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(groups)} shards of {root_url} are not there yet "
            f"({', '.join(missing[:5])}): run the ingest stage again, it resumes"
        )
    return tables, found


def _together(tables: list[pa.Table]) -> pa.Table:
    """One table of all; the list is emptied, so that only the table holds the rows.

    The fingerprints, the largest column, are in one piece: else looking for duplicates would copy them.
    """
    whole = pa.concat_tables(tables)
    tables.clear()
    pa.default_memory_pool().release_unused()
    place = SCHEMA.get_field_index("fingerprint")
    prints: Any = whole.column("fingerprint")
    if sum(len(chunk.values) for chunk in prints.chunks) >= 1 << 31:  # more than one piece can hold
        return whole
    return whole.set_column(place, SCHEMA.field(place), prints.combine_chunks())


def up_to_date(root_url: str) -> AudioManifest | None:
    """The manifest of a finished data set if its index is whole and every shard there with its size, else None."""
    manifest = find_manifest(root_url)
    if manifest is None or not all(exists(join(root_url, name)) for name in (INDEX, REJECTS)):
        return None
    if digest_bytes(read_bytes(join(root_url, INDEX))) != manifest.index_sha256:
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        whole = pool.map(lambda shard: has_size(join(root_url, shard.name), shard.bytes), manifest.shards)
        return manifest if all(whole) else None


def _collated(
    root_url: str, group_index: int, group: Sequence[Keyed], data_url: str, settings: Ingest
) -> Collated | None:
    part: Part | None = finished_part(root_url, group_index, group_digest(group, data_url, settings))
    if part is None:
        return None
    return Collated(
        shard=part.shard,
        table=to_table(part.rows),
        rows=part.rows_digest or digest_of_rows(part.rows),  # of a part that an earlier version made
        rejects=part.rejects,
        sources=part.sources,
        licences=part.licences,
    )


def _manifest(
    dataset: str,
    version: str,
    parts: list[Collated],
    table: pa.Table,
    index: bytes,
    rejects: Sequence[Reject],
    config: dict[str, Any],
    data_url: str,
) -> AudioManifest:
    shards = tuple(part.shard for part in parts if part.shard is not None)
    keys = table.column("key")
    if len(keys.unique()) != len(keys):
        raise ValueError(f"keys are not unique in {dataset}: the groups are not those of one plan_groups")
    samples = int(numbers(table.column("samples")).sum())
    every = sum(shard.samples for shard in shards)
    kept = "all" if table.num_rows == every else digest(keys.to_pylist())
    return AudioManifest(
        dataset=dataset,
        version=version,
        shards=shards,
        samples=table.num_rows,
        digest=digest(
            {"shards": [shard.sha256 for shard in shards], "rows": [part.rows for part in parts], "kept": kept}
        ),
        seconds=samples / config["sample_rate"],
        rejected=len(rejects),
        asides=dict(sorted(Counter(reject.step for reject in rejects).items())),
        config=config,
        splits=dict(sorted(Counter(split or "undeclared" for split in table.column("split").to_pylist()).items())),
        licences=_sum(part.licences for part in parts),
        sources=_sources(data_url, _sum(part.sources for part in parts)),
        index_sha256=digest_bytes(index),
    )


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _sources(data_url: str, counts: dict[str, int]) -> tuple[str, ...]:
    names = [name for name in counts if name != "unknown"]
    more = [f"and {len(names) - MAX_SOURCES} more, see the records"] if len(names) > MAX_SOURCES else []
    return (shown(data_url), *names[:MAX_SOURCES], *more)


def _same(root_url: str, manifest: AudioManifest) -> AudioManifest | None:
    """The manifest that is there already; ValueError if it is of other shards."""
    before = find_manifest(root_url)
    if before is not None and before.digest != manifest.digest:
        raise ValueError(
            f"{root_url} was published from other shards (digest {before.digest[:12]}, now "
            f"{manifest.digest[:12]}): remove that folder and run the ingest stage again"
        )
    return before


def _example(rejects: list[Reject]) -> str:
    return f"{rejects[0].original}: {rejects[0].reason}" if rejects else "there were none"
