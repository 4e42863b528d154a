"""Frame stacking and an MLP: the connector of FunASR's LLM-ASR, Seed-ASR, LTU-like projectors and many others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.connectors.frames import group_count, grouped, zero_behind


class StackMLP(nn.Module):
    """Concatenate `stack` neighbouring frames, then Linear → ReLU → Linear; without `hidden` one Linear alone.

    The remainder of a clip is dropped (FunASR's "Linear" adaptor, funasr/models/llm_asr/adaptor.py) or, where
    `drop_remainder` is False, zero-padded to a last group. Seed-ASR (arXiv 2407.04675) stacks 4, has one Linear and
    pads. A clip shorter than one group is zero-padded to one in either case.
    """

    def __init__(self, width: int, stack: int, hidden: int | None, out: int, drop_remainder: bool = True) -> None:
        super().__init__()
        self.stack = stack
        self.drop_remainder = drop_remainder
        self.linear1 = nn.Linear(width * stack, hidden or out)
        self.linear2 = nn.Linear(hidden, out) if hidden else None

    def tokens(self, frames: int) -> int:
        return group_count(frames, self.stack, self.drop_remainder)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)`, `(clips,)` → `(clips, tokens, out)`, `(clips,)`."""
        counts = group_count(lengths, self.stack, self.drop_remainder)
        stacked = grouped(zero_behind(frames, lengths), self.stack, int(counts.max())).flatten(2)
        projected = self.linear1(stacked)
        return projected if self.linear2 is None else self.linear2(torch.relu(projected)), counts
