"""Names of HTSAT's public weights, as Microsoft CLAP and Pengi publish them, to those of transformers' CLAP."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from models.encoders.clap_frontend import mel_filters
from models.encoders.public import prefix_of

Renames = tuple[tuple[str, str | tuple[str, ...]], ...]  # as models.checkpoints has them

ANCHOR = "base.htsat.bn0.weight"
FILTERS = "logmel_extractor.melW"
BLOCK, OURS = r"layers\.(\d+)\.blocks\.(\d+)\.", r"layers.\1.blocks.\2."
PARTS = {
    r"attn\.proj\.": "attention.output.dense.",
    r"attn\.(?=relative_position_(?:bias_table|index)$)": "attention.self.",
    r"mlp\.fc1\.": "intermediate.dense.",
    r"mlp\.fc2\.": "output.dense.",
    r"norm1\.": "layernorm_before.",
    r"norm2\.": "layernorm_after.",
}


def htsat_renames(official: str, ours: str) -> Renames:
    """HTSAT's names → transformers' ClapAudioEncoder, for `models.checkpoints`: regexes of beginnings and their texts.

    `official` is the regex of what stands before theirs, `ours` the text of what stands before ours. The one layer for
    query, key and value is cut into three.
    """
    query_key_value = tuple(f"{ours}{OURS}attention.self.{part}." for part in ("query", "key", "value"))
    return (
        (rf"{official}{BLOCK}attn\.qkv\.", query_key_value),
        *((f"{official}{BLOCK}{theirs}", f"{ours}{OURS}{name}") for theirs, name in PARTS.items()),
        (rf"{official}bn0\.", f"{ours}batch_norm."),
        (rf"{official}(?=(?:patch_embed|norm|layers\.\d+\.downsample)\.)", ours),
    )


def htsat_ignored(official: str) -> tuple[str, ...]:
    """Regexes of whole names that say nothing about the features: the spectrogram's constants, classifier, masks."""
    constants = rf"{official}(?:spectrogram_extractor|logmel_extractor|tscam_conv|head)\..*"
    return constants, f"{official}{BLOCK}attn_mask"


def is_htsat(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a Microsoft CLAP or Pengi checkpoint."""
    return prefix_of(state, ANCHOR) is not None


def from_htsat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`...base.htsat.*` → `layers.*` and `...projection.*` → `projection.*`, the names of `ClapEncoder`.

    What stands before may be `audio_encoder.` (Pengi, CLAP 2023), `clap.` (its captioner) or more; other parts of the
    checkpoint are left out. Raises ValueError for names without HTSAT, for a tensor of HTSAT that is not known, or if
    the checkpoint's own mel filters are not those of the front end.
    """
    prefix = prefix_of(state, ANCHOR)
    if prefix is None:
        raise ValueError(f"no name ends with {ANCHOR}: these are no weights of Microsoft CLAP's HTSAT")
    base = f"{prefix}base.htsat."
    if base + FILTERS in state:
        check_filters(state[base + FILTERS])
    official = re.escape(base)
    renames = (*htsat_renames(official, "layers."), (re.escape(f"{prefix}projection."), "projection."))
    ignored = htsat_ignored(official)
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        names = renamed(name, renames)
        if not names and name.startswith(base) and not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise ValueError(f"HTSAT with {name!r} is not supported; Microsoft's has none")
        ours |= zip(names, value.chunk(len(names)) if len(names) > 1 else (value,), strict=False)
    return ours


def renamed(name: str, renames: Renames) -> list[str]:
    """Our names of one tensor: none, one, or one for each part that it is cut into."""
    for pattern, replacement in renames:
        if match := re.match(pattern, name):
            texts = (replacement,) if isinstance(replacement, str) else replacement
            return [match.expand(text) + name[match.end() :] for text in texts]
    return []


def check_filters(filters: Tensor) -> None:
    """Raises ValueError if mel filters, `(513, bins)`, are not the front end's: the features would be others."""
    own = mel_filters(filters.shape[-1], torch.device("cpu"))
    if filters.shape != own.shape or not torch.allclose(filters.float().cpu(), own, atol=1e-5):
        raise ValueError(
            f"the checkpoint's {FILTERS} are not the front end's filters (50 Hz to 14 kHz at 32 kHz): weights trained "
            "with others are not supported"
        )
