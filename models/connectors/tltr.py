"""Time- and layer-wise transformer: how LTU-AS reads all layers of a frozen Whisper (arXiv 2309.14405, section 2)."""

from __future__ import annotations

from torch import Tensor, nn

from models.connectors.blocks import ResidualBlock
from models.connectors.frames import zero_behind
from models.connectors.linear import LinearProjector
from models.encoders.loading import valid_mask


class TLTR(nn.Module):
    """One block over time for each layer, one block over the layers for each moment, mean over layers, projection.

    Both blocks are shared, by all layers and by all moments; there are no positions. Official code: class ATModel of
    YuanGongND/ltu, src/ltu_as, which has one head over time and eight over layers; it starts from Whisper-AT.
    """

    def __init__(self, layers: int, width: int, out: int, time_heads: int = 1, layer_heads: int = 8) -> None:
        super().__init__()
        self.layers = layers
        self.time_tr = ResidualBlock(width, time_heads)
        self.layer_tr = ResidualBlock(width, layer_heads)
        self.audio_proj = LinearProjector(width, out, norm="plain")

    def tokens(self, frames: int) -> int:
        return self.audio_proj.tokens(frames)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, layers x width)` with the layers side by side → `(clips, tokens, out)`, `(clips,)`."""
        clips, longest, _ = frames.shape
        present = valid_mask(lengths, longest).repeat_interleave(self.layers, 0)[:, None, None]
        by_layer = (
            zero_behind(frames, lengths).unflatten(-1, (self.layers, -1)).transpose(1, 2)
        )  # (clips, layers, frames, width)
        in_time = self.time_tr(by_layer.flatten(0, 1), present).unflatten(0, (clips, self.layers))
        by_moment = in_time.transpose(1, 2).flatten(0, 1)  # (clips x frames, layers, width)
        read = self.layer_tr(by_moment).mean(1).unflatten(0, (clips, longest))
        return self.audio_proj(read, lengths)  # type: ignore[no-any-return]
