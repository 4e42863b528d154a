"""One vector for a clip, added through zero-initialised gates inside the backbone's attention: MU-LLaMA's connector.

Source of the facts: arXiv 2308.11276 and the layout of its checkpoints (LLaMA-Adapter's zero-initialised attention
with a prefix of one).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.connectors.frames import zero_behind


class SwiGLU(nn.Module):
    """x + w2(silu(w1(n)) · w3(n)) with n the RMS-normalised x; no biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """`(..., width)` → the same."""
        normed = self.norm(vectors)
        return vectors + self.w2(functional.silu(self.w1(normed)) * self.w3(normed))  # type: ignore[no-any-return]


class ZeroAdapter(nn.Module):
    """Mean over time, weighted sum of the encoder's layers, L2 norm, Linear, SwiGLU blocks: one vector a clip.

    `injection` says what a backbone layer adds to its attention. `layers` and `heads` are the backbone's; the last
    `adapted` layers have a query, all own a gate per head. Paper sizes: about 608.3 M parameters. In the checkpoints
    the parts are named mu_mert_agg, mu_mert_proj, mu_mert_norm_i and mu_mert_fi_j (block i, w j), each counted from 1.
    """

    def __init__(
        self,
        encoder_layers: int = 25,
        width: int = 1024,
        out: int = 4096,
        layers: int = 32,
        heads: int = 32,
        adapted: int = 20,
        blocks: int = 3,
        hidden: int | None = None,
        head_width: int | None = None,
    ) -> None:
        super().__init__()
        self.first = layers - adapted
        self.head_width = head_width or out // heads
        self.agg = nn.Conv1d(encoder_layers, 1, kernel_size=1)
        self.proj = nn.Linear(width, out)
        self.blocks = nn.Sequential(*(SwiGLU(out, hidden or 4 * out) for _ in range(blocks)))
        self.prefix_query = nn.Embedding(adapted, out)
        self.gate = nn.Parameter(torch.zeros(layers, heads))

    def tokens(self, frames: int) -> int:
        return 1

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, encoder layers x width)`, `(clips,)` → one vector, `(clips, 1, out)`, `(clips,)`."""
        mean = zero_behind(frames, lengths).sum(1) / lengths[:, None].to(frames.dtype)
        vector = self.agg(mean.unflatten(-1, (self.agg.in_channels, -1)))  # (clips, 1, width)
        return self.blocks(self.proj(functional.normalize(vector, dim=-1))), torch.ones_like(lengths)

    def injection(self, layer: int, vector: Tensor, v_proj: Callable[[Tensor], Tensor]) -> Tensor:
        """What layer `layer` adds to its attention's output before the output projection, for a clip of each row.

        `(rows, out)` → `(rows, 1, heads x head width)`. `v_proj` is the layer's value projection without its LoRA;
        where it has fewer heads than the queries, each is repeated. Raises ValueError for a layer without a query.
        """
        if not self.first <= layer < len(self.gate):
            raise ValueError(f"layers {self.first} to {len(self.gate) - 1} are adapted, not {layer}")
        values = v_proj(self.prefix_query.weight[layer - self.first] + vector).unflatten(-1, (-1, self.head_width))
        gate = self.gate[layer].tanh()
        values = values.repeat_interleave(len(gate) // values.shape[1], dim=1)
        return (gate[:, None] * values).flatten(1)[:, None]  # type: ignore[no-any-return]
