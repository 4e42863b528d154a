"""A clean, complete copy of a registered model for others: checked, with card and licences, nothing of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from components.digest import digest_file
from components.registry.evaluation_record import read_evaluation
from components.registry.export_card import export_card
from components.registry.licences import LICENSES, licences_text, shares, warnings
from components.registry.mlflow_registry import DIGEST_TAG, Entry
from components.registry.model_folder import MANIFEST, Folder, sha256
from components.registry.scrub import Scrubber, private_places, refuse_private
from infra import storage

README, LINEAGE, CONFIG = "README.md", "lineage.json", "config.json"
PARTS = re.compile(  # the files that a model consists of; nothing else goes out
    r"(config|generation_config|lineage|metrics|evaluation|vocab|added_tokens|special_tokens_map)\.json"
    r"|(tokenizer|tokenizer_config|chat_template|preprocessor_\w+|model\.safetensors\.index)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|(tokenizer|sentencepiece|spiece)\.model|(vocab|merges)\.txt"
    r"|chat_template\.jinja|recipe\.yaml|README\.md"
)
WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")  # vocabularies: left alone


class Exported(NamedTuple):
    """What was made: where, the sha256 of each file, and what whoever publishes it has to know."""

    place: str
    files: dict[str, str]
    warnings: list[str]


def build(entry: Entry, folder: Folder, into: Path, lake: str, licence: str | None = None) -> Exported:
    """Write the copy into an empty local folder. ValueError for a file that is no part of a model, or that tells
    something of this machine that cannot be taken out.
    """
    odd = sorted(name for name in folder.files if not PARTS.fullmatch(name))
    if odd:
        raise ValueError(
            f"{entry.name}/{entry.version} holds {', '.join(odd[:5])}, which is no part of a model (safetensors, "
            "configuration, tokenizer, card): take it out, and register the folder again"
        )
    if CONFIG not in folder.files or not any(name.endswith(".safetensors") for name in folder.files):
        raise ValueError(f"{entry.name}/{entry.version} has no {CONFIG} or no weights: train and register it again")
    places = private_places(lake)
    scrubber = Scrubber([*places, entry.url])
    for name, expected in folder.files.items():
        _copy(storage.join(folder.url, name), into / name, expected)
    for path in sorted(into.iterdir()):
        _scrub(path, scrubber)
    lineage = _json(into / LINEAGE)
    data, weights = shares(lineage), sorted(map(str, lineage.get("weights", {})))
    readme = (into / README).read_text() if (into / README).exists() else ""
    evaluation = read_evaluation(folder.url)
    card = export_card(scrubber.prose(readme), entry.name, data, weights, evaluation, licence)
    (into / README).write_text(card)
    (into / LICENSES).write_text(licences_text(data, weights, lineage.get("code", {})))
    refuse_private(into, places)
    files = {path.name: digest_file(path) for path in sorted(into.iterdir())}
    architecture = folder.manifest.get("architecture") or _json(into / CONFIG).get("architecture")
    origin = {"name": entry.name, "version": entry.version, "digest": entry.tags.get(DIGEST_TAG)}
    manifest = {"architecture": architecture, "exported": origin, "files": files}
    (into / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return Exported(str(into), files, warnings(data, weights))


def refuse_place(place: str, lake: str, overwrite: bool) -> None:
    """ValueError for a folder in the lake or around it, or one in which something else than an older export lies."""
    if storage.is_local(place) and storage.is_local(lake):
        target, root = (Path(os.path.realpath(storage.local_path(one))) for one in (place, lake))
        inside = target.is_relative_to(root) or root.is_relative_to(target)
    else:
        target_url, root_url = place.rstrip("/") + "/", lake.rstrip("/") + "/"
        inside = target_url.startswith(root_url) or root_url.startswith(target_url)
    if inside:
        raise ValueError(f"{storage.shown(place)} is in the lake, or around it: export to a place outside of it")
    if storage.is_local(place) and storage.local_path(place).is_file():
        raise ValueError(f"{place} is a file: name a folder")
    if not storage.list_names(place):
        return
    if not overwrite:
        raise ValueError(f"{storage.shown(place)} is not empty: name another folder, or replace it with --overwrite")
    if not _is_export(place):
        raise ValueError(
            f"{storage.shown(place)} holds something that Earloom did not export: --overwrite replaces an older export "
            "alone; remove it yourself, or name another folder"
        )


@contextmanager
def scratch(place: str) -> Iterator[Path]:
    """An empty folder to build in: beside a local place, so that publishing is renaming."""
    beside = None
    if storage.is_local(place):
        beside = storage.local_path(place).absolute().parent
        beside.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".tmp-earloom-", dir=beside))
    try:
        (made / "model").mkdir()
        yield made / "model"
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish(built: Path, place: str, files: dict[str, str]) -> None:
    """Bring a built folder to its place: locally by renaming, in a store with the manifest last; then read it again.

    Nobody sees a part of it. OSError if what lies there is not what was built.
    """
    if storage.is_local(place):
        target = storage.local_path(place).absolute()
        before = built.parent / "before"
        if target.exists():
            os.replace(target, before)
        try:
            os.replace(built, target)
        except OSError:
            if before.exists():
                os.replace(before, target)
            raise
    else:
        storage.remove_tree(storage.join(place, MANIFEST))
        for name in storage.find(place):
            if name not in files:
                storage.remove_tree(storage.join(place, name))
        manifest = (built / MANIFEST).read_bytes()
        (built / MANIFEST).unlink()
        storage.upload_folder(built, place)
        storage.write_bytes(storage.join(place, MANIFEST), manifest)
    wrong = [name for name, expected in files.items() if sha256(storage.join(place, name)) != expected]
    if wrong:
        raise OSError(f"{storage.shown(place)}: {', '.join(wrong[:3])} arrived with other bytes: export again")


def _copy(source: str, target: Path, expected: str) -> None:
    """A copy whose bytes are those that were registered."""
    with storage.open_read(source) as file, open(target, "xb") as made:
        shutil.copyfileobj(file, made, 8 << 20)
    if digest_file(target) != expected:
        raise ValueError(f"{storage.shown(source)} changed while it was copied: export again")
    target.chmod(0o644)


def _scrub(path: Path, scrubber: Scrubber) -> None:
    """A structured file without what is private; its bytes stay as they are if there is nothing in it."""
    if path.name in WORDS or path.suffix not in (".json", ".yaml"):
        return
    text = path.read_text()
    value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    clean = scrubber.value(value)
    if clean == value:
        return
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(clean, sort_keys=False, allow_unicode=True))
    else:
        path.write_text(json.dumps(clean, ensure_ascii=False, indent=2) + "\n")


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text()) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _is_export(place: str) -> bool:
    try:
        manifest = storage.read_json(storage.join(place, MANIFEST))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "exported" in manifest
