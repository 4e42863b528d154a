"""Several hidden layers in a frame, and the mean over a whole clip: `EncoderSpec.layers` and `pool`."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from models.encoders import ENCODERS, EncoderSpec, LayeredEncoder, build_encoder
from models.encoders.base import pool
from models.encoders.frontend import log_mel
from tests.models.encoder_helpers import clips

WIDTH = 16
CONVOLVED = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "initializer_range": 0.2,
}
CONFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
MOONSHINE = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "encoder_num_hidden_layers": 3,
    "encoder_num_attention_heads": 2,
    "initializer_range": 0.2,
}
WHISPER = {
    "d_model": WIDTH,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 100,
    "init_std": 0.2,
}
CONFIGS = {
    "moonshine": MOONSHINE,
    "whisper": WHISPER,
    "hubert": CONVOLVED,
    "wavlm": CONVOLVED,
    "mert": CONVOLVED | {"do_stable_layer_norm": True},
    "w2vbert": CONFORMER | {"output_hidden_size": WIDTH},
    "parakeet": CONFORMER | {"subsampling_conv_channels": 4},
}


def spec(kind: str, **entries: object) -> EncoderSpec:
    return EncoderSpec.model_validate({"kind": kind, "config": CONFIGS[kind]} | entries)


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_side_by_side_are_the_layers_one_by_one(kind: str) -> None:
    batch = clips(9000, 300, 20000, seed=3)
    with torch.inference_mode():
        both = build_encoder(spec(kind, layers=(0, 1, 3)))
        found = both(batch)
        single = [build_encoder(spec(kind, layer=k))(batch) for k in (1, 3)]
        first = build_encoder(spec(kind, layers=(0,)))(batch)
    assert isinstance(both, LayeredEncoder)
    assert both.width == 3 * WIDTH
    for i, clip in enumerate(batch):
        assert found[i].shape == (both.output_length(len(clip)), 3 * WIDTH)
        expected = torch.cat([first[i], single[0][i], single[1][i]], dim=-1)
        assert torch.equal(found[i], expected)
        assert (found[i][:, :WIDTH] - found[i][:, WIDTH : 2 * WIDTH]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [0, 3])
def test_pooling_each_layer_is_pooling_the_frames(kind: str, size: int) -> None:
    batch = clips(9000, 300, 20000, seed=3)
    with torch.inference_mode():
        whole = build_encoder(spec(kind, layers=(0, 2)))(batch)
        pooled_encoder = build_encoder(spec(kind, layers=(0, 2), pool=size))
        pooled = pooled_encoder(batch)
    for clip, frames, found in zip(batch, whole, pooled, strict=True):
        assert found.shape == (pooled_encoder.output_length(len(clip)), 2 * WIDTH)
        assert (found - pool(frames, size)).abs().max() < 1e-6
    if size == 0:
        assert [len(found) for found in pooled] == [1, 1, 1]
        assert (pooled[0][0] - whole[0].mean(dim=0)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["whisper", "moonshine"])
def test_a_last_layer_norm_belongs_to_the_default_output_only(kind: str) -> None:
    batch = clips(20000, seed=3)
    with torch.inference_mode():
        encoder = build_encoder(spec(kind))
        last = build_encoder(spec(kind, layers=(3,)))(batch)[0]
        default = encoder(batch)[0]
        norm = cast(torch.nn.Module, encoder.layers.layer_norm)  # type: ignore[union-attr]
    assert (norm(last) - default).abs().max() < 1e-6
    assert (last - default).abs().max() > 1e-3


def test_whisper_layers_equal_transformers() -> None:
    encoder = build_encoder(spec("whisper", layers=(0, 1, 2, 3), window=True))
    clip = clips(32000, seed=3)[0]
    with torch.inference_mode():
        theirs = encoder.layers(log_mel(clip)[None], output_hidden_states=True)  # type: ignore[operator]
        found = encoder([clip])[0].split(WIDTH, dim=1)
        normed = encoder.layers.layer_norm(found[3])  # type: ignore[operator, union-attr]
    for k in range(3):
        assert (found[k] - theirs.hidden_states[k][0]).abs().max() < 1e-5
    assert (normed - theirs.last_hidden_state[0]).abs().max() < 1e-5


def test_ltu_as_features_are_25_frames_of_32_layers() -> None:
    """LTU-AS, extract_whisper_feature.py: 10 s, 500 frames of Whisper-large-v1, layers 1 to 32, mean over 20."""
    large = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    config = large | {"max_source_positions": 500}
    wanted = EncoderSpec(kind="whisper", config=config, window=True, layers=tuple(range(1, 33)), pool=20)
    with torch.device("meta"):
        encoder = build_encoder(wanted)
    assert (encoder.output_length(16_000), encoder.output_length(480_000)) == (25, 25)
    assert (encoder.width, encoder.frame_rate) == (32 * 1280, 2.5)
    assert encoder.seconds_of(16_000) == 10.0


def test_only_one_layer_is_held_at_its_frame_rate() -> None:
    """The states come one by one: asking for the first runs no block, and none behind the last kept one runs."""
    encoder = build_encoder(spec("whisper", layers=(0, 1, 2)))
    assert isinstance(encoder, LayeredEncoder)
    ran: list[int] = []
    for number, block in enumerate(encoder.layers.layers, start=1):  # type: ignore[arg-type, union-attr]
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = encoder.states(torch.zeros(1, 8000), torch.tensor([8000]))
    seen = []
    for _ in states:
        seen.append(list(ran))
    assert seen == [[], [1], [1, 2]]
    assert ran == [1, 2]


def test_seconds_that_are_computed() -> None:
    with torch.device("meta"):
        plain, pooled, whole, window = (
            build_encoder(EncoderSpec(kind="whisper", **entries))  # type: ignore[arg-type]
            for entries in ({}, {"pool": 4}, {"pool": 0}, {"window": True, "pool": 20})
        )
    assert [encoder.seconds_of(160_000) for encoder in (plain, pooled, whole, window)] == [10.0, 10.0, 10.0, 30.0]
    assert (whole.frame_rate, whole.output_length(160_000), whole.output_length(1)) == (50.0, 1, 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_reach_every_weight_that_is_used(kind: str) -> None:
    """Also after a pass in inference mode, whose tensors nothing may keep."""
    encoder = build_encoder(spec(kind))
    batch = clips(9000, 20000, seed=3)
    with torch.inference_mode():
        encoder(batch)
    assert all(parameter.requires_grad for name, parameter in encoder.named_parameters() if "positions" not in name)
    sum(frames.square().sum() for frames in encoder(batch)).backward()  # type: ignore[union-attr]
    silent = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert silent <= {"layers.embed_positions.weight"}
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in encoder.named_parameters() if "conv" in n)


def test_specs_that_say_two_things_are_refused() -> None:
    with pytest.raises(ValueError, match="either layer or layers, not both"):
        EncoderSpec(kind="whisper", layer=1, layers=(1, 2))
    for layers in ((2, 1), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="layers must rise from 0 or more, none twice"):
            EncoderSpec(kind="whisper", layers=layers)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        EncoderSpec(kind="whisper", pool=-1)
    for kind in CONFIGS:
        with pytest.raises(ValueError, match="layers must lie between 0 and 3"):
            build_encoder(spec(kind, layers=(0, 4)))
    with pytest.raises(ValueError, match="'beats' cannot keep several layers"), torch.device("meta"):
        build_encoder(EncoderSpec(kind="beats", layers=(0, 1)))
    assert EncoderSpec.model_validate_json(spec("whisper", layers=(1, 2)).model_dump_json()).layers == (1, 2)
    assert set(CONFIGS) < set(ENCODERS)
