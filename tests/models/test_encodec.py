"""EnCodec's tokens: transformers' codes, exact in a cache, alone as in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from models.encoders import EncoderSpec, build_encoder
from models.encoders.encodec import EncodecEncoder, codes_of
from models.encoders.mert import resample
from tests.models.encoder_helpers import (
    check_a_padded_batch_equals_each_clip_alone,
    check_lengths_are_known_without_running,
    check_what_lies_in_the_padding_does_not_matter,
    clips,
)

TINY: dict[str, Any] = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1}


def tiny(**entries: Any) -> EncodecEncoder:
    """Random layers, with codebooks that lie where their output does: else one code would be nearest to all of it."""
    encoder = build_encoder(EncoderSpec(kind="encodec", config=TINY | entries))
    assert isinstance(encoder, EncodecEncoder)
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        left = encoder.layers.encoder(torch.randn(1, 1, 1024 * encoder.hop, generator=chance))
        for number, layer in enumerate(encoder.layers.quantizer.layers):
            drawn = torch.randn(layer.codebook.embed.shape, generator=chance) * left.std()
            layer.codebook.embed.copy_(drawn if number else left[0].T)
            left = left[..., torch.randperm(1024, generator=chance)] * 0.5
    return encoder


def official(encoder: EncodecEncoder) -> EncodecModel:
    model = EncodecModel(EncodecConfig(**TINY)).eval()
    missing = model.load_state_dict(encoder.layers.state_dict(), strict=False).missing_keys
    assert all(name.startswith("decoder.") for name in missing)
    return model


def heard(encoder: EncodecEncoder, *batch: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [codes_of(frames.bfloat16()) for frames in encoder(list(batch))]  # as a cache holds them


@pytest.mark.parametrize(("books", "bandwidth"), [(8, 6.0), (2, 1.5), (32, 24.0)])
def test_codes_are_those_of_transformers(books: int, bandwidth: float) -> None:
    encoder, clip = tiny(books=books), 10 * clips(16_000)[0]
    (codes,) = heard(encoder, clip)
    with torch.inference_mode():
        theirs = official(encoder).encode(resample(clip)[None, None], bandwidth=bandwidth).audio_codes[0, 0]
    assert codes.shape == (75, books) and len(codes.unique()) > 20 and codes.max() > 255
    assert torch.equal(codes, theirs.T)


def test_codes_in_every_precision() -> None:
    exact, fast = tiny(), build_encoder(EncoderSpec(kind="encodec", config=TINY, compute="bfloat16"))
    fast.load_state_dict(exact.state_dict())
    batch = clips(9_000, 4_000)
    with torch.inference_mode():
        assert torch.equal(torch.cat(exact(batch)), torch.cat(fast(batch)))


def test_batches_lengths_and_padding() -> None:
    encoder = tiny()
    loud = [10 * clip for clip in clips(9_000, 16_161, 100, 4_001, 40_000)]
    check_a_padded_batch_equals_each_clip_alone(encoder, loud)
    check_lengths_are_known_without_running(encoder, 1, 2, 212, 213, 214, 426, 427, 16_000, 31_999)
    check_what_lies_in_the_padding_does_not_matter(encoder, 500)
    assert encoder.frame_rate == 75.0 and encoder.output_length(160_000) == 750


@pytest.mark.parametrize("older", [False, True])
def test_published_weights_are_read(tmp_path: Path, older: bool) -> None:
    encoder, (clip,) = tiny(), clips(16_000)
    official(encoder).save_pretrained(tmp_path)
    if older:  # as the files on the hub name weight normalisation
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        state = load_file(tmp_path / "model.safetensors")
        for new, old in names.items():
            state = {name.replace(new, old): value for name, value in state.items()}
        save_file(state, tmp_path / "model.safetensors")
    read = build_encoder(EncoderSpec(kind="encodec", weights=str(tmp_path)))
    assert isinstance(read, EncodecEncoder)
    assert torch.equal(heard(read, clip)[0], heard(encoder, clip)[0])


@pytest.mark.parametrize(
    ("entries", "given", "message"),
    [
        ({"books": 33}, {}, "books must lie between 1 and 32"),
        ({"sampling_rate": 48_000}, {}, "only EnCodec's causal model for 24 kHz"),
        ({"normalize": True}, {}, "only EnCodec's causal model for 24 kHz"),
        ({}, {"pool": 2}, "leave pool and layer out"),
        ({}, {"layer": 1}, "leave pool and layer out"),
    ],
)
def test_what_has_no_codes_is_refused(entries: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderSpec(kind="encodec", config=TINY | entries, **given))


@pytest.mark.parametrize("frames", [torch.full((2, 4), 0.5), torch.full((2, 4), 256.0), torch.zeros(2, 3)])
def test_frames_of_others_are_no_codes(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="made by encoder 'encodec'"):
        codes_of(frames)
