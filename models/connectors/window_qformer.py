"""Window-level Q-Former over two frame streams: the connector of SALMONN (arXiv 2310.13289, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class WindowQFormer(nn.Module):
    """LayerNorm each stream, concatenate by frame, cut into windows, let learned queries read each window.

    The shorter stream is zero-padded after its LayerNorm, windows do not overlap and the last partial one is
    dropped (a clip shorter than a window is zero-padded to one). The Q-Former is BERT-shaped with
    cross-attention in every layer and starts from random weights; transformers' BLIP-2 module has no text branch.
    """

    def __init__(
        self, widths: tuple[int, int], window: int, queries: int, layers: int, hidden: int, heads: int, out: int
    ) -> None:
        super().__init__()
        self.window = window
        self.ln_speech = nn.LayerNorm(widths[0])
        self.ln_audio = nn.LayerNorm(widths[1])
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

    def tokens(self, speech_frames: int, audio_frames: int) -> int:
        return max(1, max(speech_frames, audio_frames) // self.window) * self.query_tokens.shape[1]

    def forward(
        self, speech: Tensor, audio: Tensor, speech_lengths: Tensor, audio_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`(clips, frames, width)` and `(clips,)` of both streams → `(clips, tokens, out)`, `(clips,)`."""
        lengths = torch.maximum(speech_lengths, audio_lengths)
        counts = (lengths // self.window).clamp(min=1)
        windows = int(counts.max())
        joined = torch.cat(
            [
                _normalised(self.ln_speech, speech, speech_lengths, windows * self.window),
                _normalised(self.ln_audio, audio, audio_lengths, windows * self.window),
            ],
            dim=-1,
        )
        valid = torch.arange(windows, device=joined.device)[None] < counts[:, None]
        windowed = joined.reshape(len(joined), windows, self.window, -1)[valid]  # (all windows, window, width)
        queries = self.query_tokens.expand(len(windowed), -1, -1)
        read = self.qformer(query_embeds=queries, encoder_hidden_states=windowed).last_hidden_state
        tokens = joined.new_zeros(len(joined), windows, self.query_tokens.shape[1], self.proj.out_features)
        tokens[valid] = self.proj(read).to(tokens.dtype)
        return tokens.flatten(1, 2), counts * self.query_tokens.shape[1]


def _normalised(norm: nn.LayerNorm, frames: Tensor, lengths: Tensor, target: int) -> Tensor:
    """LayerNorm, then zeros behind each clip's end (its bias must not leak into padding), cut or padded to `target`."""
    valid = torch.arange(frames.shape[1], device=frames.device)[None] < lengths[:, None]
    normalised = norm(frames) * valid[..., None]
    return nn.functional.pad(normalised, (0, 0, 0, max(0, target - frames.shape[1])))[:, :target]
