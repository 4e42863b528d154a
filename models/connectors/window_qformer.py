"""Window-level Q-Former over frame streams: the connector of SALMONN (arXiv 2310.13289, section 3.1) and COSMIC."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from models.connectors.frames import group_count, grouped, zero_behind
from models.encoders.loading import valid_mask


class WindowQFormer(nn.Module):
    """LayerNorm each stream, concatenate by frame, cut into windows, let learned queries read each window.

    A shorter stream is zero-padded after its LayerNorm, windows do not overlap and the last partial one is
    dropped (a clip shorter than a window is zero-padded to one). The Q-Former is BERT-shaped with
    cross-attention in every layer and starts from random weights; transformers' BLIP-2 module has no text branch.

    SALMONN has two streams (Whisper and BEATs, LayerNorms `ln_speech` and `ln_audio`), COSMIC (arXiv 2311.02248) one.
    Raises ValueError if `streams` does not name every width.
    """

    ln_speech: nn.LayerNorm
    ln_audio: nn.LayerNorm  # with two streams

    def __init__(
        self,
        widths: tuple[int, ...],
        window: int,
        queries: int,
        layers: int,
        hidden: int,
        heads: int,
        out: int,
        streams: tuple[str, ...] = ("speech", "audio"),
    ) -> None:
        super().__init__()
        if not 1 <= len(widths) <= len(streams):
            raise ValueError(f"{len(widths)} widths, but names for {len(streams)} streams: {', '.join(streams)}")
        self.window = window
        self.streams = streams[: len(widths)]
        for name, width in zip(self.streams, widths, strict=True):
            self.add_module(f"ln_{name}", nn.LayerNorm(width))
        self.query_tokens = nn.Parameter(torch.empty(1, queries, hidden).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * hidden,
                cross_attention_frequency=1,
                encoder_hidden_size=sum(widths),
            )
        )
        self.proj = nn.Linear(hidden, out)

    def tokens(self, *frames: int) -> int:
        """From the frames of each stream."""
        return group_count(max(frames), self.window) * self.query_tokens.shape[1]

    def forward(self, *frames_and_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)` of each stream, then `(clips,)` of each → `(clips, tokens, out)`, `(clips,)`.

        Raises ValueError unless there are frames and lengths for each stream.
        """
        if len(frames_and_lengths) != 2 * len(self.streams):
            names = ", ".join(self.streams)
            raise ValueError(f"wanted frames, then lengths, of {names}; got {len(frames_and_lengths)} tensors")
        frames, lengths = frames_and_lengths[: len(self.streams)], frames_and_lengths[len(self.streams) :]
        counts = group_count(torch.stack(lengths).amax(0), self.window)
        windows = int(counts.max())
        valid = valid_mask(counts, windows)
        cut = [self._cut(*stream, windows) for stream in zip(self.streams, frames, lengths, strict=True)]
        read = self._read(torch.cat(cut, dim=-1)[valid])
        tokens = read.new_zeros(*valid.shape, *read.shape[1:])
        tokens[valid] = read
        return tokens.flatten(1, 2), counts * read.shape[1]

    def _cut(self, stream: str, frames: Tensor, lengths: Tensor, windows: int) -> Tensor:
        """LayerNorm, then zeros behind each clip's end: its bias must not leak into padding."""
        norm = self.get_submodule(f"ln_{stream}")
        return grouped(zero_behind(norm(frames), lengths), self.window, windows)

    def _read(self, windows: Tensor) -> Tensor:
        """The queries' answers, projected, `(windows, frames, width)` → `(windows, queries, out)`."""
        queries = self.query_tokens.expand(len(windows), -1, -1)
        return self.proj(self.qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state)  # type: ignore[no-any-return]
