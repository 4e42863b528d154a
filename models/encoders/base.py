"""What every audio encoder promises: waveform in, frames out, and a length that can be asked without running."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

SAMPLE_RATE = 16_000


class EncoderSpec(BaseModel):
    """Which encoder, with which weights, and what of its output is kept: all that decides its features.

    `weights` is a reference that `models.pretrained.resolve` understands; None builds random weights from
    `config` and `seed` (tests, and the paper preset on the meta device).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str = Field(description="a name in models.encoders.ENCODERS: moonshine, whisper, beats, ...")
    weights: str | None = None
    config: dict[str, Any] = Field(
        default_factory=dict, description="sizes of the transformers config (random weights) or overrides"
    )
    layer: int | None = Field(
        None, description="hidden layer kept, 1 = after the first block; None = the last, normalised"
    )
    pool: int = Field(1, ge=1, description="mean over this many neighbouring frames (the remainder is kept)")
    window: bool = Field(
        False, description="pad to the encoder's full window and keep all of its frames (Whisper as published)"
    )
    seed: int = 0


class AudioEncoder(nn.Module):
    """Base of the encoders. Subclasses set the attributes and implement `frames_of` and `encode`.

    Attributes: `spec`; `width` of a frame; `frame_rate` in hertz (nominal, after pooling).
    """

    spec: EncoderSpec
    width: int
    frame_rate: float

    def frames_of(self, samples: int) -> int:
        """Frames before pooling for a clip of `samples` at 16 kHz; pure arithmetic, at least 1."""
        raise NotImplementedError

    def output_length(self, samples: int) -> int:
        """Frames after pooling for a clip of `samples` at 16 kHz, without running the encoder."""
        return -(-self.frames_of(samples) // self.spec.pool)

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Frames before pooling, `(batch, samples)` float32 in [-1, 1] and `(batch,)` → `(batch, frames, width)`.

        Row i is valid up to `frames_of(lengths[i])`, and that part must not depend on the padding.
        """
        raise NotImplementedError

    def forward(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Features of clips, each `(samples,)` → each `(output_length(samples), width)`, float32."""
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        padded = nn.utils.rnn.pad_sequence([waveform.float() for waveform in waveforms], batch_first=True)
        frames = self.encode(padded, lengths)
        return [pool(frames[i, : self.frames_of(int(n))], self.spec.pool) for i, n in enumerate(lengths)]

    def describe(self) -> dict[str, Any]:
        """What the features depend on besides the audio: goes into the fingerprint of a feature cache."""
        return {
            "encoder": self.spec.model_dump(mode="json"),
            "weights": weights_digest(self),
            "preprocessing": self.preprocessing(),
        }

    def preprocessing(self) -> dict[str, Any]:
        """Front end in words and numbers (mel bins, window, hop, normalisation)."""
        return {"input": "waveform", "sample_rate": SAMPLE_RATE}


def pool(frames: Tensor, size: int) -> Tensor:
    """Mean over `size` neighbouring frames, `(frames, width)` → `(ceil(frames / size), width)`."""
    if size == 1:
        return frames
    pooled = torch.nn.functional.avg_pool1d(
        frames.T[None], size, ceil_mode=True
    )  # the last window averages what is there
    return pooled[0].T


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, shapes and bytes of a module's parameters and buffers, in the order of their names."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        total.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else repr(value.item()).encode()
        )
    return total.hexdigest()
