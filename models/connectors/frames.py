"""Padded frames: nothing behind a clip's end may count, and neighbours come in groups."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from models.encoders.loading import valid_mask

Count = TypeVar("Count", int, Tensor)


def zero_behind(frames: Tensor, lengths: Tensor) -> Tensor:
    """Zeros behind each clip's end, whatever lay there (NaN too): `(clips, frames, width)`, `(clips,)` → the same."""
    return frames.masked_fill(~valid_mask(lengths, frames.shape[1])[..., None], 0)


def group_count(frames: Count, size: int, drop_remainder: bool = True) -> Count:
    """How many groups of `size` a clip gives, for one number of frames or for a tensor of them; at least one."""
    groups = frames // size if drop_remainder else -(-frames // size)
    return groups.clamp(min=1) if isinstance(groups, Tensor) else max(1, groups)


def grouped(frames: Tensor, size: int, groups: int) -> Tensor:
    """Cut or zero-padded to whole groups, `(clips, frames, width)` → `(clips, groups, size, width)`."""
    missing = max(0, groups * size - frames.shape[1])
    return nn.functional.pad(frames, (0, 0, 0, missing))[:, : groups * size].unflatten(1, (groups, size))  # type: ignore[no-any-return]
