"""Where a model comes from, as digests: data, features, recipe, code and packages. No time and no host name in it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from components.digest import digest
from components.schema import AudioManifest, FeatureManifest

ROOMS = ("components", "infra", "models", "pipelines")  # the four packages whose sources make the code digest
PACKAGES = (
    "accelerate", "huggingface-hub", "jiwer", "mlflow-skinny", "numpy", "peft", "prefect", "pyarrow", "pydantic", "ray",
    "safetensors", "soundfile", "soxr", "tokenizers", "torch", "transformers", "webdataset",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]


def lineage(
    audio: Sequence[AudioManifest],
    features: Sequence[FeatureManifest],
    recipe: Mapping[str, Any],
    weights: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `lineage.json` holds; `weights` maps references of pretrained weights to their folder digests.

    `digest` at the end is over everything before it except `platform`, so that two machines can agree.
    """
    found: dict[str, Any] = {
        "schema_version": 1,
        "data": [_audio(manifest) for manifest in audio],
        "features": [_features(manifest) for manifest in features],
        "recipe": {"digest": digest(dict(recipe))},
        "weights": dict(sorted((weights or {}).items())),
        "code": code(),
        "packages": packages(),
        "python": platform.python_version(),
    }
    found |= dict(extra or {})
    return found | {"digest": digest(found), "platform": platform.platform()}


def code(root: Path = REPOSITORY) -> dict[str, Any]:
    """The git commit (None outside a checkout), whether files differ from it, and the digest of the sources."""
    commit = _git(root, "rev-parse", "HEAD") if _is_checkout(root) else None
    changed = bool(_git(root, "status", "--porcelain", "--", *ROOMS)) if commit else None
    return {"commit": commit, "changed": changed, "digest": code_digest(root)}


@cache
def code_digest(root: Path = REPOSITORY) -> str:
    """sha256 over the paths and bytes of every Python file of the four packages, in the order of their paths."""
    total = hashlib.sha256()
    for path in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        # Lengths go in too, so that no two sets of files can be told apart only by where one ends.
        name, data = path.relative_to(root).as_posix().encode(), path.read_bytes()
        total.update(f"{len(name)}:{len(data)}:".encode() + name + data)
    return total.hexdigest()


def packages(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide numbers or formats; those not installed are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _audio(manifest: AudioManifest) -> dict[str, Any]:
    kept = ("dataset", "version", "digest", "samples", "seconds", "licences", "sources")
    return {key: value for key, value in manifest.model_dump(mode="json").items() if key in kept}


def _features(manifest: FeatureManifest) -> dict[str, Any]:
    kept = ("kind", "fingerprint", "digest", "dataset", "version", "audio_digest", "key")
    return {key: value for key, value in manifest.model_dump(mode="json").items() if key in kept}


def _is_checkout(root: Path) -> bool:
    """A wheel installed inside somebody else's repository must not take that one's commit."""
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == root.resolve()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        # No optional locks: looking at the state must not touch a repository that someone is working in.
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
