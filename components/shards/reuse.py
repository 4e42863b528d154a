"""Shards that another version of the data set has already: `<lake>/audio/<dataset>/known/<digest of the group>.json`.

A data set to which files are added becomes a new version; the groups that did not change are taken over as they are.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from components.digest import digest_file
from components.schema import Strict
from components.seal import read_sealed, sealed
from components.shards.parts import Part, digest_of_rows, finished_part, part_url, shard_name
from infra.storage import is_local, join, local_copy, scratch, upload, write_bytes

KNOWN = "known"


class Known(Strict):
    """Where a group was made into a shard."""

    version: str
    group: int
    seal: str = ""


def remember(root_url: str, group_index: int, part: Part) -> None:
    """Note that this version has the shard of a group, before its record is there: a finished group has its note."""
    lake, version = _split(root_url)
    write_bytes(_note(lake, part.inputs), sealed(Known(version=version, group=group_index)))


def taken_over(root_url: str, group_index: int, inputs: str) -> Part | None:
    """The part of a group that another version has, with its shard copied here; None if no version has it whole."""
    lake, version = _split(root_url)
    try:
        known = read_sealed(_note(lake, inputs), Known)
    except (FileNotFoundError, ValueError):
        return None
    other = join(lake, known.version)
    part = finished_part(other, known.group, inputs) if known.version != version else None
    if part is None:
        return None
    name = shard_name(group_index)
    if part.shard is not None:
        if not copied(join(other, part.shard.name), part.shard.sha256, join(root_url, name)):
            return None  # damaged there: made anew here
        shard = part.shard.model_copy(update={"name": name})
        rows = tuple(row.model_copy(update={"shard": name}) for row in part.rows)
        part = part.model_copy(update={"shard": shard, "rows": rows, "rows_digest": digest_of_rows(rows)})
    write_bytes(part_url(root_url, group_index), sealed(part))
    return part


def copied(source: str, sha256: str, target: str) -> bool:
    """Copy a shard to another place of the lake if its bytes have this sha256; whether it was done."""
    with tempfile.TemporaryDirectory(dir=scratch(target)) as folder:
        try:
            copy = local_copy(source, Path(folder))
            if is_local(source):
                copy = Path(shutil.copyfile(copy, Path(folder, "copy.tar")))
        except (FileNotFoundError, ValueError):
            return False
        if digest_file(copy) != sha256:
            return False
        upload(copy, target)
    return True


def _split(root_url: str) -> tuple[str, str]:
    """The folder of the data set, and the version."""
    folder, _, version = root_url.rstrip("/").rpartition("/")
    return folder, version


def _note(folder: str, inputs: str) -> str:
    return join(folder, KNOWN, f"{inputs}.json")
