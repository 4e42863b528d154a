"""One vector becomes a prefix: the transformer mapper of Pengi.

Source: arXiv 2305.11834; official code microsoft/Pengi, models/decoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.connectors.blocks import attend
from models.connectors.frames import zero_behind
from models.encoders.loading import valid_mask


class Attention(nn.Module):
    """Self-attention with one matrix for keys and values; only the output has a bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        keys, values = self.to_keys_values(tokens).chunk(2, dim=-1)
        return self.project(attend(self.to_queries(tokens), keys, values, self.heads, visible))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two Linears with a ReLU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(tokens)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, ratio * width)

    def forward(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens), visible)
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The layers; there are no positions and no norm at the end."""

    def __init__(self, width: int, layers: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads, ratio) for _ in range(layers)])

    def forward(self, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, visible)
        return tokens


class TransformerMapper(nn.Module):
    """L2-normalise, Linear to `prefix` vectors, append as many learned constants, transform, keep the constants.

    With `sequence` the input is word embeddings of a prompt, `width` = `out`, and stands in the place of the Linear's
    vectors (`base_no_text_enc`); words behind a prompt's end are not attended to, where the official code pads prompts
    to 40 words that are. Pengi's configuration says 8 layers and its code halves them to 4.
    Raises ValueError for a sequence whose width is not `out`.
    """

    def __init__(
        self,
        width: int,
        out: int,
        prefix: int,
        layers: int = 4,
        heads: int = 8,
        ratio: int = 2,
        sequence: bool = False,
    ) -> None:
        super().__init__()
        if sequence and width != out:
            raise ValueError(f"a sequence of word embeddings is not projected: its width {width} must be {out}")
        self.linear = None if sequence else nn.Linear(width, prefix * out)
        self.prefix_const = nn.Parameter(torch.randn(prefix, out))
        self.transformer = Transformer(out, layers, heads, ratio)

    def tokens(self, frames: int) -> int:
        return len(self.prefix_const)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, 1, width)`, or `(clips, words, out)` for a sequence → `(clips, prefix, out)`, `(clips,)`.

        Raises ValueError if there is more than one vector a clip and this is no mapper of sequences.
        """
        prefix = len(self.prefix_const)
        frames = zero_behind(frames, lengths)
        constants = self.prefix_const.expand(len(frames), -1, -1)
        visible = None
        if self.linear is None:
            visible = functional.pad(valid_mask(lengths, frames.shape[1]), (0, prefix), value=True)[:, None, None]
        elif frames.shape[1] != 1:
            raise ValueError(f"the mapper takes one vector a clip, got {frames.shape[1]}")
        else:
            frames = self.linear(functional.normalize(frames[:, 0], dim=-1)).unflatten(-1, (prefix, -1))
        mapped = self.transformer(torch.cat([frames, constants], dim=1), visible)
        return mapped[:, -prefix:], torch.full_like(lengths, prefix)
