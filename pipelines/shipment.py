"""What is sent to a cluster so that this code runs there: a working directory, environment variables, packages.

Secrets are not: what a job is given, everybody reads who reaches the cluster's dashboard. A cluster has its own roles,
profiles and secrets; who wants to send a variable all the same names it in `ray_env`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from infra import storage
from infra.cluster import NOTHING
from infra.stores import shown
from pipelines.config import RunConfig

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipelines", "components", "models", "infra")
JUNK = ("**/__pycache__/", "*.pyc")

# Of another folder all but what is large, made again there, or nobody else's to read.
NOT_SENT = (
    *JUNK,
    *(".git/", ".venv/", "venv/", "node_modules/", ".mypy_cache/", ".ruff_cache/", ".pytest_cache/", ".hypothesis/"),
    *("/data/", "/lake/", "/demo/", "/dist/", "/mlruns/", "/mlartifacts/", "mlflow.db"),
    *(".env", ".env.*", ".aws/", ".ssh/", ".ray/", "*.pem", "*.key", ".netrc", "credentials*.json", "*token*.json"),
    *("*.tar", "*.safetensors", "*.gguf", "*.pt", "*.pth", "*.flac", "*.wav", "*.mp3"),
)

# Where things are, as a stage on the cluster has to find the same; none of them is a secret.
FORWARDED = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("EARLOOM_S3_SSE", "EARLOOM_S3_KMS_KEY", "EARLOOM_S3_ADDRESSING"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
)


def runtime_env(config: RunConfig, job: bool) -> dict[str, Any]:
    """Ray's `runtime_env` of a job, or of a driver that runs here: there only what the person asked for."""
    given = dict(config.ray_env)
    made = _working_dir(config, job)
    excludes = [*made.pop("excludes", []), *given.pop("excludes", [])]
    variables = (_variables() if job else {}) | {k: str(v) for k, v in (given.pop("env_vars", None) or {}).items()}
    made |= given
    if variables:
        made["env_vars"] = variables
    if excludes and "://" not in str(made.get("working_dir", "://")):
        made["excludes"] = excludes
    return made


def _working_dir(config: RunConfig, job: bool) -> dict[str, Any]:
    folder = config.ray_working_dir
    if folder == NOTHING or (folder is None and not (job and is_checkout(CHECKOUT))):
        return {}
    if folder is None or Path(folder) == CHECKOUT:
        return {"working_dir": str(CHECKOUT), "excludes": only_code(CHECKOUT)}
    if "://" in folder:
        return {"working_dir": folder}
    return {
        "working_dir": folder,
        "excludes": [*NOT_SENT, *_inside(folder, config.lake), *_inside(folder, config.data)],
    }


def only_code(folder: Path) -> list[str]:
    """Patterns for all but the code of a checkout, whatever else lies there.

    Not `/*` with exceptions: that is the folder itself too, for Ray, and nothing would be sent.
    """
    others = [name for name in sorted(os.listdir(folder)) if name not in PACKAGES]
    return [*("/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name) for name in others), *JUNK]


def is_checkout(folder: Path) -> bool:
    """Whether this code lies in a folder of its own, and not among the installed packages."""
    return (folder / "pyproject.toml").is_file() and all((folder / name).is_dir() for name in PACKAGES)


def _inside(folder: str, url: str) -> list[str]:
    """The pattern of a lake or data folder that lies in the folder."""
    if not storage.is_local(url):
        return []
    path = Path(os.path.realpath(storage.local_path(url)))
    real = Path(os.path.realpath(folder))
    return [f"/{path.relative_to(real)}"] if path != real and path.is_relative_to(real) else []


def _variables() -> dict[str, str]:
    """Of this environment, without those in which a password is part of a URL."""
    found = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    return {name: value for name, value in found.items() if shown(value) == value}
