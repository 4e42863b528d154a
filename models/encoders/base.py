"""What every audio encoder promises: waveform in, frames out, and a length that can be asked without running."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.encoders.precision import products

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
    layers: tuple[int, ...] = Field(
        (), description="hidden layers kept side by side in a frame, rising; 0 = what enters the first block"
    )
    pool: int = Field(
        1, ge=0, description="mean over this many neighbouring frames (the remainder is kept); 0 = over the whole clip"
    )
    window: bool = Field(
        False, description="pad to the encoder's full window and keep all of its frames (Whisper as published)"
    )
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of its matrix products while it does not learn; spectra are float32 always"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _one_way_to_keep(self) -> Self:
        if self.layers and self.layer is not None:
            raise ValueError(f"give either layer or layers, not both; got layer={self.layer}, layers={self.layers}")
        if list(self.layers) != sorted({layer for layer in self.layers if layer >= 0}):
            raise ValueError(f"layers must rise from 0 or more, none twice; got {self.layers}")
        return self

    @property
    def kept(self) -> int:
        """Hidden states in a frame."""
        return max(1, len(self.layers))

    def pooled_rate(self, rate: float) -> float:
        """Frames a second after pooling; over a whole clip (pool 0) there is no rate, and that before it is given."""
        return rate / max(1, self.pool)


class AudioEncoder(nn.Module):
    """Base of the encoders. Subclasses set the attributes and implement `frames_of` and `encode`.

    Attributes: `spec`; `width` of a frame; `frame_rate` in hertz (nominal, after pooling; with pool 0 before it).
    """

    spec: EncoderSpec
    width: int
    frame_rate: float

    @property
    def device(self) -> torch.device:
        """Where it computes; an encoder without parameters does so on the CPU."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def __call__(self, waveforms: list[Tensor]) -> list[Tensor]:
        """`forward`, in the precision that the spec names wherever it runs: live frames are those of a cache.

        An encoder that learns takes the precision of the training step around it.
        """
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        with products(self.device, None if learns else self.spec.compute == "bfloat16"):
            return [frames.float() for frames in super().__call__(waveforms)]

    def frames_of(self, samples: int) -> int:
        """Frames before pooling for a clip of `samples` at 16 kHz; pure arithmetic, at least 1."""
        raise NotImplementedError

    def output_length(self, samples: int) -> int:
        """Frames after pooling for a clip of `samples` at 16 kHz, without running the encoder."""
        return -(-self.frames_of(samples) // self.spec.pool) if self.spec.pool else 1

    def seconds_of(self, samples: int) -> float:
        """Seconds of audio that are computed for a clip of `samples` at 16 kHz: more than it has with a full window."""
        return self.frames_of(samples) / (self.frame_rate * max(1, self.spec.pool))

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Frames before pooling, `(batch, samples)` float32 in [-1, 1] and `(batch,)` → `(batch, frames, width)`.

        Row i is valid up to `frames_of(lengths[i])`, and that part must not depend on the padding.
        """
        raise NotImplementedError

    def forward(self, waveforms: list[Tensor]) -> list[Tensor]:
        """Features of clips, each `(samples,)` → each `(output_length(samples), width)`, float32."""
        padded, lengths = pad(waveforms)
        return self.pooled(self.encode(padded, lengths), lengths)

    def pooled(self, frames: Tensor, lengths: Tensor) -> list[Tensor]:
        """The valid frames of each row, `(batch, frames, width)` → pooled, each `(output_length, width)`."""
        return [pool(row[: self.frames_of(int(n))], self.spec.pool) for row, n in zip(frames, lengths, strict=True)]

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


class LayeredEncoder(AudioEncoder):
    """An encoder that can keep several hidden layers (`spec.layers`). Subclasses implement `states` for `encode`.

    Each layer is pooled before the next one is computed: 32 layers of Whisper-large at its frame rate are 80 MB for ten
    seconds, pooled by 20 they are 4 MB.
    """

    def states(self, waveforms: Tensor, lengths: Tensor) -> Iterator[Tensor]:
        """The kept hidden states in the order of `spec.layers`, each `(batch, frames, hidden width)`, one at a time."""
        raise NotImplementedError

    def encode(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat(list(self.states(waveforms, lengths)), dim=-1)

    def forward(self, waveforms: list[Tensor]) -> list[Tensor]:
        padded, lengths = pad(waveforms)
        kept = [self.pooled(state, lengths) for state in self.states(padded, lengths)]
        return [torch.cat(parts, dim=-1) for parts in zip(*kept, strict=True)]


def run_blocks(
    spec: EncoderSpec,
    state: Tensor,
    blocks: nn.ModuleList,
    step: Callable[[nn.Module, Tensor], Tensor],
    last: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The hidden states that a spec keeps of a stack of blocks; those behind the deepest one kept do not run.

    `step` applies one block; `last` is what stands behind the stack (a LayerNorm) and belongs to the default output
    only: a hidden layer is what its block gave. Shapes stay `(batch, frames, width)`.
    """
    depth = spec.layers[-1] if spec.layers else spec.layer
    if 0 in spec.layers:
        yield state
    for number, block in enumerate(blocks[:depth], start=1):
        state = step(block, state)
        if number in spec.layers:
            yield state
    if not spec.layers:
        yield last(state) if last is not None and spec.layer is None else state


def pad(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips, each `(samples,)` → `(batch, samples)` float32 with zeros behind their ends, and `(batch,)` lengths."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return nn.utils.rnn.pad_sequence([waveform.float() for waveform in waveforms], batch_first=True), lengths


def pool(frames: Tensor, size: int) -> Tensor:
    """Mean over `size` neighbouring frames, `(frames, width)` → `(ceil(frames / size), width)`; 0 = over all."""
    if size == 1:
        return frames
    if size == 0:
        return frames.mean(dim=0, keepdim=True)
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
