"""Audio encoders by name."""

from __future__ import annotations

from collections.abc import Callable

from models.encoders.base import AudioEncoder, EncoderSpec
from models.encoders.beats import BeatsEncoder
from models.encoders.hubert import HubertEncoder
from models.encoders.moonshine import MoonshineEncoder
from models.encoders.whisper import WhisperEncoder

ENCODERS: dict[str, Callable[[EncoderSpec], AudioEncoder]] = {
    "moonshine": MoonshineEncoder,
    "whisper": WhisperEncoder,
    "beats": BeatsEncoder,
    "hubert": HubertEncoder,
}


def build_encoder(spec: EncoderSpec) -> AudioEncoder:
    """The encoder of a spec: eval mode, float32, on the default device (also the meta device, without weights).

    Raises ValueError for a kind that is not in ENCODERS.
    """
    if spec.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {spec.kind!r}; known are {', '.join(sorted(ENCODERS))}")
    return ENCODERS[spec.kind](spec)


__all__ = ["ENCODERS", "AudioEncoder", "EncoderSpec", "build_encoder"]
