"""Attention over heads, and the pre-norm transformer block that several connectors share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, visible: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention, `(batch, length, heads x d)` and `(batch, keys, heads x d)` → `(batch, length, heads x d)`.

    `visible` is True where a query may look, broadcast to `(batch, heads, length, keys)`; each query must see a key.
    It excludes `causal`.
    """
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the names and biases of openai-whisper: the key has no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, frames: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        mixed = attend(self.query(frames), self.key(frames), self.value(frames), self.heads, visible, causal)
        return self.out(mixed)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """LayerNorm, self-attention, residual; LayerNorm, GELU MLP, residual: Whisper's encoder block.

    The MLP is four times as wide as a frame unless `ffn` says otherwise. Names are those of openai-whisper.
    """

    def __init__(self, width: int, heads: int, ffn: int | None = None) -> None:
        super().__init__()
        ffn = ffn or 4 * width
        self.attn = SelfAttention(width, heads)
        self.attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, frames: Tensor, visible: Tensor | None = None, causal: bool = False) -> Tensor:
        """`(batch, length, width)` → the same; `visible` and `causal` as in `attend`."""
        frames = frames + self.attn(self.attn_ln(frames), visible, causal)
        return frames + self.mlp(self.mlp_ln(frames))  # type: ignore[no-any-return]
