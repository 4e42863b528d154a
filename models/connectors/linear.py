"""Mean over neighbouring frames, LayerNorm, Linear: the connector of LTU, LTU-AS, Qwen-Audio and LLaSM."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.connectors.frames import group_count, grouped, zero_behind

Norm = Literal["none", "plain", "affine"]


def mean_pool(frames: Tensor, lengths: Tensor, size: int, counts: Tensor) -> Tensor:
    """Mean over groups of `size` frames, `(clips, frames, width)` → `(clips, counts.max(), width)`.

    A group that reaches over a clip's end is the mean of what is there.
    """
    groups = int(counts.max())
    begin = torch.arange(groups, device=frames.device) * size
    present = (lengths[:, None] - begin).clamp(1, size)
    return grouped(zero_behind(frames, lengths), size, groups).sum(2) / present[..., None].to(frames.dtype)


class LinearProjector(nn.Module):
    """Mean over `pool` frames, an optional LayerNorm ("plain" learns nothing, "affine" does), Linear with bias.

    LTU (arXiv 2305.10790, src/ltu): pool 2, plain; it divides by 50 before the LayerNorm, which is the same as an
    `eps` of 50² x 1e-5. LTU-AS (arXiv 2309.14405): plain. Qwen-Audio (arXiv 2311.07919, audio.py): pool 2, affine
    (`ln_post`), pooled before the norm. LLaSM (arXiv 2308.15930): the Linear alone. A clip gives at least one token.

    Raises ValueError for an unknown `norm`.
    """

    def __init__(
        self,
        width: int,
        out: int,
        pool: int = 1,
        norm: Norm = "none",
        drop_remainder: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}; got {norm!r}")
        self.pool = pool
        self.drop_remainder = drop_remainder
        self.norm = (
            nn.Identity() if norm == "none" else nn.LayerNorm(width, eps=eps, elementwise_affine=norm == "affine")
        )
        self.proj = nn.Linear(width, out)

    def tokens(self, frames: int) -> int:
        return group_count(frames, self.pool, self.drop_remainder)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)`, `(clips,)` → `(clips, tokens, out)`, `(clips,)`."""
        counts = group_count(lengths, self.pool, self.drop_remainder)
        return self.proj(self.norm(mean_pool(frames, lengths, self.pool, counts))), counts
