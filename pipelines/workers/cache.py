"""Cache actors: all missing features of one audio shard, decoded once; or what one feature shard says to k-means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from components.features.extract import Target, extract_all
from components.features.form import Form
from components.features.key import refuse_other_numerics
from components.features.lloyd import Sums, shard_sums
from components.features.projection import load_projection
from components.features.store import FeatureStore
from components.features.units import load_codebook
from components.schema import ShardInfo
from components.shards.index import read_rows
from models.encoders import build_encoder
from models.preset import Preset


def extractor(
    preset: dict[str, Any],
    audio_root: str,
    roots: dict[str, str],
    keys: dict[str, dict[str, Any]],
    codebook_url: str | None,
    forms: dict[str, str] | None = None,
    projection_urls: dict[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Work of a cache actor: all missing features of one audio shard, decoded once.

    By role: `roots`, `keys`, `forms` (bf16 where none is named), and `projection_urls` for forms that need them.
    Raises ValueError on a machine that would compute other numbers than the caches' keys say.
    """
    torch.set_num_threads(1)  # one process a core
    codebook = load_codebook(codebook_url)[0] if codebook_url else None
    specs = Preset.model_validate(preset).encoders
    projections = {role: load_projection(url)[0] for role, url in (projection_urls or {}).items()}
    targets = [
        Target(
            encoder=build_encoder(specs[role]).to(_device(keys[role])),
            root=root,
            codebook=codebook,
            form=Form.parse((forms or {}).get(role, "bf16")),
            projection=projections.get(role),
            folder=root.rsplit("/", 2)[0],  # <lake>/features/<fingerprint>, above data set and version
        )
        for role, root in roots.items()
    ]
    for target, role in zip(targets, roots, strict=True):
        refuse_other_numerics(keys[role], target.encoder)
    rows = read_rows(audio_root)

    def work(shard: ShardInfo) -> Any:
        return extract_all(shard, list(rows.where("shard", shard.name)), audio_root, targets)

    return work


def _device(key: dict[str, Any]) -> torch.device:
    """Where the caches' key says that the encoder computes, as far as this machine can."""
    asked = torch.device(key["numerics"]["device"])
    return asked if asked.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def summer(root: str) -> Callable[[list[str], Tensor], Sums]:
    """Work of a k-means actor: sums over the clips of one feature shard about the centres of a pass."""
    torch.set_num_threads(1)  # one process a core, and the same bits in each
    store = FeatureStore(root)
    return lambda keys, centres: shard_sums(store, centres, keys)
