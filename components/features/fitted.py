"""What is fitted once, k-means and principal components: tensors and a sealed record, in a folder named by its inputs.

The record is written last. A fit that was killed, or another one at the same time, leaves the same files or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from safetensors.torch import load, save
from torch import Tensor

from components.digest import digest, digest_bytes
from components.schema import Strict
from components.seal import read_sealed, sealed
from infra.storage import exists, join, publish_bytes, read_bytes

NOT_ITS_OWN = "its manifest is not the one it was published with"


class Files(NamedTuple):
    """Names in the folder."""

    tensors: str
    manifest: str


Record = TypeVar("Record", bound=Strict)
Fit = Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]  # the tensors, and what the record says besides


def publish_fitted(folder: str, files: Files, kind: type[Record], inputs: dict[str, Any], fit: Fit) -> tuple[str, str]:
    """URL and digest of what has these inputs; what is not there yet is fitted and published below `folder`."""
    name = digest(inputs)[:16]
    url = join(folder, name)
    if exists(join(url, files.manifest)):
        return url, name
    made, said = fit()
    publish_bytes(join(url, files.tensors), save(made))
    data = read_bytes(join(url, files.tensors))  # a fit that was killed, or another one, may have published it before
    record = kind.model_validate(inputs | {"digest": name, "sha256": digest_bytes(data)} | said)
    publish_bytes(join(url, files.manifest), sealed(record, indent=2))
    return url, name


def load_fitted(url: str, files: Files, kind: type[Record], inputs: Sequence[str]) -> tuple[dict[str, Tensor], Record]:
    """The tensors and their record, whose `inputs` make its digest. ValueError or FileNotFoundError if damaged."""
    record = read_sealed(join(url, files.manifest), kind)
    named = record.model_dump()
    data = read_bytes(join(url, files.tensors))
    if digest_bytes(data) != named["sha256"]:
        raise ValueError("its sha256 is not the manifest's")
    if digest({name: named[name] for name in inputs})[:16] != named["digest"]:
        raise ValueError(NOT_ITS_OWN)
    return load(data), record
