"""Audio Flamingo's two parts: a transformer over window vectors, and gated cross-attention before each LM layer.

Source: arXiv 2402.01831; official code NVIDIA/audio-flamingo, branch legacy_audio_flamingo_1, src/helpers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.connectors.blocks import attend
from models.connectors.frames import zero_behind
from models.encoders.loading import valid_mask

EPS = 1e-6


class CrossAttention(nn.Module):
    """LayerNorm on the text, queries from it, keys and values from the media; nothing has a bias."""

    def __init__(self, width: int, media_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, hidden: Tensor, media: Tensor, visible: Tensor) -> Tensor:
        keys, values = self.to_kv(media).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(self.norm(hidden)), keys, values, self.heads, visible))  # type: ignore[no-any-return]


class GatedCrossAttention(nn.Module):
    """Cross-attention and a feed-forward, each added through a tanh gate that starts at zero, or the first at `opened`.

    With closed gates the language model is what it was. Paper sizes: 36,708,354 parameters.
    """

    def __init__(
        self, width: int = 2048, media_width: int = 1024, heads: int = 8, head_width: int = 64, opened: float = 0.0
    ) -> None:
        super().__init__()
        self.attn = CrossAttention(width, media_width, heads, head_width)
        self.attn_gate = nn.Parameter(torch.full((1,), opened))
        self.ff = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, media: Tensor, visible: Tensor) -> Tensor:
        """`(rows, length, width)`, `(rows, media, media width)`, `(rows, length, media)` bool → like `hidden`.

        `visible` is True where a token may attend to a media vector. A token that sees none passes unchanged, through
        the feed-forward too; media that no token sees may hold anything.
        """
        if not media.shape[1]:
            return hidden
        listening = visible.any(2, keepdim=True)
        media = media.masked_fill(~visible.any(1)[..., None], 0)
        # A softmax over nothing is NaN in some kernels: who sees none attends to all, and what comes out is not used.
        attended = self.attn(hidden, media, (visible | ~listening)[:, None])
        mixed = hidden + self.attn_gate.tanh() * attended
        mixed = mixed + self.ff_gate.tanh() * self.ff(mixed)
        return torch.where(listening, mixed, hidden)


class Positions(nn.Module):
    """A fixed table of sinusoids, sine and cosine alternating."""

    pos_table: Tensor

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        rates = 10000.0 ** -(torch.arange(width, dtype=torch.float64) // 2 * 2 / width)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
        even = torch.arange(width) % 2 == 0
        self.register_buffer("pos_table", torch.where(even, angles.sin(), angles.cos()).float()[None])

    def forward(self, frames: Tensor) -> Tensor:
        return frames + self.pos_table[:, : frames.shape[1]]


class PostNormAttention(nn.Module):
    """Self-attention without biases, residual, LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, frames: Tensor, visible: Tensor) -> Tensor:
        mixed = attend(self.w_qs(frames), self.w_ks(frames), self.w_vs(frames), self.heads, visible)
        return self.layer_norm(frames + self.fc(mixed))  # type: ignore[no-any-return]


class PostNormFeedForward(nn.Module):
    """Linear, ReLU, Linear, residual, LayerNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, hidden)
        self.w_2 = nn.Linear(hidden, width)
        self.layer_norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, frames: Tensor) -> Tensor:
        return self.layer_norm(frames + self.w_2(torch.relu(self.w_1(frames))))  # type: ignore[no-any-return]


class PostNormLayer(nn.Module):
    """Both of them."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.slf_attn = PostNormAttention(width, heads)
        self.pos_ffn = PostNormFeedForward(width, ffn)

    def forward(self, frames: Tensor, visible: Tensor) -> Tensor:
        return self.pos_ffn(self.slf_attn(frames, visible))  # type: ignore[no-any-return]


class AudioTransformer(nn.Module):
    """Scale by √width, add sinusoids, LayerNorm, three post-norm layers. Paper sizes: 25,189,376 parameters.

    Windows behind a clip's end are not attended to. The official code attends to all 16, absent ones too, and masks
    those in the cross-attention only: hand them in as windows that count, and leave them out of `visible`, to do so.
    """

    def __init__(
        self, width: int = 1024, layers: int = 3, heads: int = 8, ffn: int = 2048, positions: int = 128
    ) -> None:
        super().__init__()
        self.scale = width**0.5
        self.positions = positions
        self.position_enc = Positions(width, positions)
        self.layer_norm = nn.LayerNorm(width, eps=EPS)
        self.layer_stack = nn.ModuleList([PostNormLayer(width, heads, ffn) for _ in range(layers)])

    def tokens(self, frames: int) -> int:
        return frames

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """One vector a window, `(clips, windows, width)`, `(clips,)` → the same shapes.

        Raises ValueError for more windows than there are positions.
        """
        if frames.shape[1] > self.positions:
            raise ValueError(f"{frames.shape[1]} windows, but positions for {self.positions}")
        visible = valid_mask(lengths, frames.shape[1])[:, None, None]
        frames = self.layer_norm(self.position_enc(zero_behind(frames, lengths) * self.scale))
        for layer in self.layer_stack:
            frames = layer(frames, visible)
        return frames, lengths
