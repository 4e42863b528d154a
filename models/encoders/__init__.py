"""Audio encoders by name."""

from __future__ import annotations

from importlib import import_module

from models.encoders.base import AudioEncoder, EncoderSpec, LayeredEncoder

# kind -> module and class; a module of transformers is imported when its encoder is asked for
ENCODERS = {
    "moonshine": "moonshine.MoonshineEncoder",
    "whisper": "whisper.WhisperEncoder",
    "beats": "beats.BeatsEncoder",
    "hubert": "hubert.HubertEncoder",
    "wavlm": "wavlm.WavLMEncoder",
    "mert": "mert.MertEncoder",
    "w2vbert": "w2vbert.W2vBertEncoder",
    "parakeet": "parakeet.ParakeetEncoder",
    "cavmae": "cavmae.CavMaeEncoder",
    "clap": "clap.ClapEncoder",
    "encodec": "encodec.EncodecEncoder",
    "transcriber": "transcriber.TranscriberEncoder",
    "decoder_states": "decoder_states.DecoderStatesEncoder",
}


def build_encoder(spec: EncoderSpec) -> AudioEncoder:
    """The encoder of a spec: eval mode, float32, on the default device (also the meta device, without weights).

    Raises ValueError for a kind that is not in ENCODERS, and for `layers` of an encoder that cannot keep several.
    """
    if spec.kind not in ENCODERS:
        raise ValueError(f"unknown encoder {spec.kind!r}; known are {', '.join(sorted(ENCODERS))}")
    module, _, name = ENCODERS[spec.kind].partition(".")
    encoder: AudioEncoder = getattr(import_module(f"{__name__}.{module}"), name)(spec)
    if spec.layers and not isinstance(encoder, LayeredEncoder):
        raise ValueError(f"encoder {spec.kind!r} cannot keep several layers; leave layers={spec.layers} out")
    return encoder


__all__ = ["ENCODERS", "AudioEncoder", "EncoderSpec", "LayeredEncoder", "build_encoder"]
