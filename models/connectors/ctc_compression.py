"""Fewer frames by what a CTC head hears in them: the compressor of Speech-LLaMA (arXiv 2307.03917).

All functions take frames `(clips, frames, width)`, valid frames `(clips,)` and the head's log-probabilities
`(clips, frames, vocabulary)`, and return `(clips, longest, width)` and `(clips,)`. Which frames go together is not
differentiable; what is in them is. How many a clip keeps depends on its content, but it is never none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.connectors.frames import zero_behind
from models.encoders.loading import valid_mask

Method = Literal["average", "blank_removal", "blank_probability"]


def compress(
    frames: Tensor, lengths: Tensor, log_probs: Tensor, method: Method, blank: int = 0, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """By name; `threshold` is that of "blank_probability" (the paper does not publish one). Raises ValueError else."""
    if method == "average":
        return average(frames, lengths, log_probs)
    if method == "blank_removal":
        return blank_removal(frames, lengths, log_probs, blank)
    if method == "blank_probability":
        return blank_probability(frames, lengths, log_probs, blank, threshold)
    raise ValueError(f"method must be average, blank_removal or blank_probability; got {method!r}")


def average(frames: Tensor, lengths: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each run of frames with the same best label; runs of blanks are runs like others."""
    valid = valid_mask(lengths, frames.shape[1])
    best = log_probs.argmax(-1)
    begins = torch.cat([torch.ones_like(best[:, :1]), (best[:, 1:] != best[:, :-1]).long()], dim=1) * valid
    counts = begins.sum(1)
    runs = torch.arange(int(counts.max()), device=frames.device)
    member = (begins.cumsum(1)[:, None] == runs[:, None] + 1) & valid[:, None]  # (clips, runs, frames)
    # A product rather than scatter_add, whose sums on CUDA come in another order each time.
    sums = member.to(frames.dtype) @ zero_behind(frames, lengths)
    return sums / member.sum(-1, keepdim=True).clamp(min=1).to(frames.dtype), counts


def blank_removal(frames: Tensor, lengths: Tensor, log_probs: Tensor, blank: int = 0) -> tuple[Tensor, Tensor]:
    """The frames whose best label is not blank; in a clip of blanks only, the one least so."""
    return _keep(frames, lengths, log_probs[..., blank], log_probs.argmax(-1) != blank)


def blank_probability(
    frames: Tensor, lengths: Tensor, log_probs: Tensor, blank: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """The frames whose probability of blank is below `threshold`; if there is none, the one with the lowest."""
    return _keep(frames, lengths, log_probs[..., blank], log_probs[..., blank].exp() < threshold)


def _keep(frames: Tensor, lengths: Tensor, blankness: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    valid = valid_mask(lengths, frames.shape[1])
    least = blankness.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
    kept = kept & valid
    kept = kept | (torch.zeros_like(kept).scatter(1, least, True) & ~kept.any(1, keepdim=True))
    counts = kept.sum(1)
    order = (~kept).byte().argsort(dim=1, stable=True)[:, : int(counts.max())]
    picked = frames.gather(1, order[..., None].expand(-1, -1, frames.shape[2]))
    return zero_behind(picked, counts), counts
