"""What may not stand in our sources: calls that run what they read, or hand text to a shell. Read as syntax trees.

Names are followed through imports (`import numpy as np`, `from torch import load`), so that another name hides nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Modules whose whole purpose is to make objects, and run code, from bytes.
UNPICKLERS = {"pickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
RUNNERS = {"eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module", "code.interact"}
UNPACKERS = {"shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"}
READERS = {"pandas.read_pickle", "torch.serialization._load", "yaml.load"}
READERS |= {f"yaml.{name}" for name in ("load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")}
# All of MLflow that is used: a catalogue. Its flavours load models, and with them whatever those were pickled with.
MLFLOW = ("mlflow.MlflowClient", "mlflow.exceptions", "mlflow.entities", "mlflow.protos")
# Modules named by a value: each looks the value up in a list of ours first (deployments.py: in our prefect.yaml).
IMPORTERS = {
    "models/architectures/__init__.py", "models/encoders/__init__.py", "models/weights/store.py",
    "pipelines/deployments.py",
}  # fmt: skip
OURS = ("pipelines.", "components.", "models.", "infra.")


class Finding(NamedTuple):
    """One place."""

    file: str
    line: int
    what: str


def check_folder(root: Path, rooms: tuple[str, ...]) -> tuple[list[Finding], int]:
    """Findings in the Python files of some folders, and how many files were read."""
    files = sorted(path for room in rooms for path in (root / room).rglob("*.py"))
    findings = [f for path in files for f in check(path.read_text(), path.relative_to(root).as_posix())]
    return findings, len(files)


def check(source: str, file: str = "x.py") -> list[Finding]:
    """Findings in one file, by line."""
    nodes = list(ast.walk(ast.parse(source, file)))
    names = _imported(nodes)
    return sorted(Finding(file, line, what) for line, what in (*_imports(nodes), *_calls(nodes, names, file)))


def _imported(nodes: list[ast.AST]) -> dict[str, str]:
    """Local name -> what it stands for, with dots."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _imports(nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if UNPICKLERS & set(module.split(".")):
                yield node.lineno, f"imports {module}"
            if module.partition(".")[0] == "mlflow" and not module.startswith(MLFLOW):
                yield node.lineno, f"takes {module} of MLflow, which is a catalogue here and no loader"


def _calls(nodes: list[ast.AST], names: dict[str, str], file: str) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        for found in (_by_name(called, node, given, file), *_by_argument(called, given)):
            if found:
                yield node.lineno, found


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` → `numpy.load`; a method of something unknown is `?.name`."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names) or '?'}.{node.attr}"
    return ""


def _by_name(called: str, node: ast.Call, given: dict[str, ast.expr], file: str) -> str | None:
    last = called.rpartition(".")[2]
    if called in SHELLS | RUNNERS | UNPACKERS | READERS:
        return f"calls {called}"
    if called == "torch.load" and not _is(given.get("weights_only"), lambda value: value is True):
        return "calls torch.load without weights_only=True"
    if last in ("extract", "extractall") and "." in called and not called.startswith("tarfile.data_filter"):
        return f"unpacks an archive to the disk with {called}"
    if called == "getattr" and node.args and _dotted(node.args[0], {}) in ("os", "subprocess", "builtins"):
        return "reaches into a module by a name that is not written here"
    if called == "importlib.import_module" and file not in IMPORTERS and not _is_ours(node.args[0]):
        return "imports a module that is named by a value"
    if last == "load_model" or called.startswith(("mlflow.pyfunc", "mlflow.pytorch", "mlflow.transformers")):
        return f"lets MLflow load a model with {called}"
    return None


def _by_argument(called: str, given: dict[str, ast.expr]) -> Iterator[str]:
    if "shell" in given and not _is(given["shell"], lambda value: value is False):
        yield f"hands text to a shell with {called}"
    if _is(given.get("trust_remote_code"), bool):
        yield "runs the code of a model's folder (trust_remote_code)"
    if "allow_pickle" in given and not _is(given["allow_pickle"], lambda value: value is False):
        yield "reads pickled arrays (allow_pickle)"
    if "weights_only" in given and not _is(given["weights_only"], lambda value: value is True):
        yield "unpickles weights (weights_only)"


def _is_ours(module: ast.expr) -> bool:
    """Whether a module's name is written there, or at least its package, which is one of ours."""
    if isinstance(module, ast.JoinedStr):
        return _is(module.values[0], lambda value: str(value).startswith(OURS))
    return isinstance(module, ast.Constant)


def _is(node: ast.expr | None, fits: Callable[[object], bool]) -> bool:
    return isinstance(node, ast.Constant) and bool(fits(node.value))
