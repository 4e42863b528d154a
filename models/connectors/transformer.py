"""Pre-norm transformer layers between encoder and backbone: the adapters of SLM and Speech-LLaMA."""

from __future__ import annotations

from torch import Tensor, nn

from models.connectors.blocks import ResidualBlock
from models.connectors.frames import group_count, zero_behind
from models.encoders.loading import valid_mask


class TransformerAdapter(nn.Module):
    """Keep every `stride`-th frame, Linear in, `layers` pre-norm layers, LayerNorm, Linear out.

    The layers have width `hidden`, the encoder's unless it says otherwise; either Linear is there only where widths
    differ. `norm` is the LayerNorm behind the last layer. There are no positions: the frames carry the encoder's.

    SLM (arXiv 2310.00230) publishes 156 M and neither depth nor width; 5 layers of 1536 with FFN 6144, Linear to 4096,
    are 147.9 M. Speech-LLaMA (arXiv 2307.03917): `hidden` = `out` = 4096, 4 layers, `causal` or not.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        ffn: int,
        out: int,
        hidden: int | None = None,
        stride: int = 1,
        causal: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden or width
        self.stride = stride
        self.causal = causal
        self.linear_in = nn.Linear(width, hidden) if width != hidden else nn.Identity()
        self.layers = nn.ModuleList([ResidualBlock(hidden, heads, ffn) for _ in range(layers)])
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.linear_out = nn.Linear(hidden, out) if hidden != out else nn.Identity()

    def tokens(self, frames: int) -> int:
        return group_count(frames, self.stride, drop_remainder=False)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)`, `(clips,)` → `(clips, tokens, out)`, `(clips,)`."""
        counts = group_count(lengths, self.stride, drop_remainder=False)
        tokens = self.linear_in(zero_behind(frames, lengths)[:, :: self.stride])
        # Seen causally, the padding lies in the future of every token that counts.
        visible = None if self.causal else valid_mask(counts, tokens.shape[1])[:, None, None]
        for layer in self.layers:
            tokens = layer(tokens, visible, self.causal)
        return self.linear_out(self.norm(tokens)), counts
