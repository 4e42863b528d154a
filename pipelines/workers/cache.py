"""Cache actors: all missing features of one audio shard, decoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from components.features.extract import Target, extract_all
from components.features.key import refuse_other_numerics
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
) -> Callable[[Any], Any]:
    """Work of a cache actor: all missing features of one audio shard, decoded once.

    Raises ValueError on a machine that would compute other numbers than the caches' keys say.
    """
    torch.set_num_threads(1)  # one process a core
    codebook = load_codebook(codebook_url)[0] if codebook_url else None
    specs = Preset.model_validate(preset).encoders
    targets = [Target(build_encoder(specs[role]), root, codebook) for role, root in roots.items()]
    for target, role in zip(targets, roots, strict=True):
        refuse_other_numerics(keys[role], target.encoder)
    rows = read_rows(audio_root)

    def work(shard: ShardInfo) -> Any:
        return extract_all(shard, [row for row in rows if row["shard"] == shard.name], audio_root, targets)

    return work
