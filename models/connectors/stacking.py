"""Frame stacking and a two-layer MLP: the connector of FunASR's LLM-ASR, LTU-like projectors and many others."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StackMLP(nn.Module):
    """Concatenate `stack` neighbouring frames, then Linear → ReLU → Linear.

    The remainder of a clip is dropped (FunASR's "Linear" adaptor, funasr/models/llm_asr/adaptor.py); a clip
    shorter than one group is zero-padded to one.
    """

    def __init__(self, width: int, stack: int, hidden: int, out: int) -> None:
        super().__init__()
        self.stack = stack
        self.linear1 = nn.Linear(width * stack, hidden)
        self.linear2 = nn.Linear(hidden, out)

    def tokens(self, frames: int) -> int:
        return max(1, frames // self.stack)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)`, `(clips,)` → `(clips, tokens, out)`, `(clips,)`."""
        clips, longest, width = frames.shape
        counts = (lengths // self.stack).clamp(min=1)
        groups = int(counts.max())
        frames = nn.functional.pad(frames, (0, 0, 0, max(0, groups * self.stack - longest)))
        grouped = frames[:, : groups * self.stack].reshape(clips, groups, width * self.stack)
        return self.linear2(torch.relu(self.linear1(grouped))), counts
