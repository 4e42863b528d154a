"""A whole recogniser, encoder and decoder, as the feature extractor: hidden states of the decoder are the frames.

LLaSM (arXiv 2308.15930, llasm.py) feeds Whisper's decoder 64 copies of its start id and takes the last hidden states:
learned positions set them apart. Moonshine's positions are rotary, so copies would give one state 64 times: there the
decoder runs freely, and the state of each step is a frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.loading import valid_mask
from models.encoders.recogniser import TOKENS_PER_SECOND, Recogniser

POSITIONS = 64


class DecoderStatesEncoder(AudioEncoder):
    """`positions` (64) frames a clip, whatever its length; `spec.config` is that of `Recogniser`, and `positions`.

    Moonshine: greedy ids first, without gradients; then the decoder over them, where gradients flow. A frame is the
    state that predicted an id, the end included; zeros are behind it.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.recogniser = Recogniser(spec)
        self.positions, most = int(spec.config.get("positions", POSITIONS)), self.recogniser.positions
        if not 1 <= self.positions <= most:
            raise ValueError(f"positions must lie between 1 and {most}, those of the decoder; got {self.positions}")
        self.width = self.recogniser.width
        self.frame_rate = TOKENS_PER_SECOND
        self.eval()

    def frames_of(self, samples: int) -> int:
        return self.positions

    def seconds_of(self, samples: int) -> float:
        return self.recogniser.seconds_of(samples)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        frames, valid = self.recogniser.listen(waveforms, lengths)
        start = torch.full((len(lengths), 1), self.recogniser.start, device=frames.device)
        if self.recogniser.kind == "whisper":
            return self.recogniser.hidden(start.expand(-1, self.positions), frames, valid)
        limits = [min(self.positions, self.recogniser.limit(int(n))) for n in lengths]
        found = self.recogniser.decode(frames.detach(), valid, limits)
        counts = torch.tensor([len(ids) for ids in found], device=frames.device)
        rows = [torch.tensor(ids, device=frames.device) for ids in found]
        given = torch.cat([start, nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, :-1]], dim=1)
        hidden = self.recogniser.hidden(given, frames, valid)
        hidden = hidden * valid_mask(counts, hidden.shape[1])[..., None].to(hidden.dtype)
        return nn.functional.pad(hidden, (0, 0, 0, self.positions - hidden.shape[1]))

    def preprocessing(self) -> dict[str, Any]:
        fed = "copies of the start id" if self.recogniser.kind == "whisper" else "greedy ids"
        return super().preprocessing() | self.recogniser.decoding() | {"positions": self.positions, "decoder_fed": fed}
