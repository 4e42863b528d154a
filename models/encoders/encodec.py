"""EnCodec's tokens (arXiv 2210.13438) as an encoder: what codec language models such as VALL-E X are trained on.

The causal model for 24 kHz: 75 frames a second, residual codebooks of 1,024 entries, eight of them for 6 kbit/s. Frames
hold the two bytes of each code, which are exact in bfloat16, as caches keep frames; `codes_of` gives the codes back.
Layers and weights are transformers' EncodecModel without its decoder. A clip ends in silence up to a whole frame, and
to eight frames, where the official code mirrors the last samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EncodecConfig
from transformers.models.encodec.modeling_encodec import EncodecEncoder as Convolutions
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.hubert import stored
from models.encoders.loading import fill, read_json
from models.encoders.mert import RATE, resample, resampled_length
from models.encoders.precision import exact
from models.pretrained import resolve, seeded

BOOKS = 8
SPREAD = 0.1  # of random codebooks
BYTE = 256
SHORTEST = 8  # frames: the convolutions mirror up to six behind the first one to stand before it


def codes_of(frames: Tensor) -> Tensor:
    """The codes in frames of an `EncodecEncoder`, `(frames, 2 books)` → `(frames, books)` int64.

    Raises ValueError if they hold none.
    """
    pairs = frames.float().unflatten(-1, (-1, 2)) if frames.shape[-1] % 2 == 0 else None
    if pairs is None or not bool(((pairs == pairs.round()) & (pairs >= 0) & (pairs < BYTE)).all()):
        raise ValueError("these frames are not the codes of a codec: were they made by encoder 'encodec'?")
    high, low = pairs.long().unbind(-1)
    codes: Tensor = BYTE * high + low
    return codes


class Layers(nn.Module):
    """Convolutions with an LSTM, and the residual quantizer."""

    def __init__(self, config: EncodecConfig) -> None:
        super().__init__()
        self.encoder = Convolutions(config)
        self.quantizer = EncodecResidualVectorQuantizer(config)


class EncodecEncoder(AudioEncoder):
    """`spec.config` holds entries of EncodecConfig and `books`, how many codebooks are kept. No gradient passes.

    ValueError for a model that is not causal (that for 48 kHz), for more books than there are, and for codes that are
    to be pooled or taken from a layer.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        if spec.pool != 1 or spec.layer is not None:
            raise ValueError("the codes of a codec have no mean and no layers; leave pool and layer out")
        folder = resolve(spec.weights) if spec.weights else None
        entries = (read_json(folder / "config.json") if folder else {}) | spec.config
        self.books = int(entries.pop("books", BOOKS))
        config = EncodecConfig(**entries)
        if not config.use_causal_conv or config.normalize or config.sampling_rate != RATE:
            raise ValueError(f"only EnCodec's causal model for 24 kHz is built, not one for {config.sampling_rate} Hz")
        if not 1 <= self.books <= config.num_quantizers:
            raise ValueError(f"books must lie between 1 and {config.num_quantizers}, the codebooks; got {self.books}")
        self.spec = spec
        self.width = 2 * self.books
        self.frame_rate = RATE / config.hop_length
        self.hop: int = config.hop_length
        with seeded(spec.seed):
            self.layers = Layers(config)
            self.layers.quantizer.num_quantizers = self.books  # that it encodes by; it keeps the layers of all
            for layer in self.layers.quantizer.layers:
                layer.codebook.embed.normal_(std=SPREAD)  # zeros until weights are there: all codes would be 0
        if folder:
            fill(self.layers, stored(folder, self.layers), folder)
        self.eval()

    def frames_of(self, samples: int) -> int:
        return -(-resampled_length(max(1, samples)) // self.hop)

    @exact
    @torch.no_grad()
    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        sizes = [self.frames_of(int(n)) for n in lengths]
        clips = [resample(row[: max(1, int(n))]) for row, n in zip(waveforms, lengths, strict=True)]
        longest = max(*sizes, SHORTEST) * self.hop
        batch = torch.stack([functional.pad(clip, (0, longest - len(clip))) for clip in clips])
        codes = self.layers.quantizer.encode(self.layers.encoder(batch[:, None].to(self.device))).permute(1, 2, 0)
        return torch.stack([codes // BYTE, codes % BYTE], dim=-1).flatten(-2).float()

    def preprocessing(self) -> dict[str, Any]:
        own = {"resampled": "soxr HQ", "rate": RATE, "shortest": SHORTEST, "books": self.books, "bytes": "high, low"}
        return super().preprocessing() | own
