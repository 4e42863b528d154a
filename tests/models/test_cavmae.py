"""CAV-MAE's audio branch: the published count and names, LTU's front end, the block by hand, files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.encoders.base import EncoderSpec
from models.encoders.cavmae import Block, CavMaeConfig, CavMaeEncoder, grid_positions
from models.encoders.frontend import kaldi_fbank
from tests.models.encoder_helpers import clips, kaldi_by_transformers

TINY = {
    "audio_length": 48,
    "mel_bins": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 3,
    "modality_specific_depth": 2,
    "num_heads": 2,
}
TOKENS = 4 * 6
SPEC = EncoderSpec(kind="cavmae", config=TINY)


# ---- the published shape ----------------------------------------------------------------------------------------


def test_published_count_names_and_lengths() -> None:
    with torch.device("meta"):
        encoder = CavMaeEncoder(EncoderSpec(kind="cavmae"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 85_721_088
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    norms = {f"{norm}{branch}" for norm in ("norm1", "norm2") for branch in ("", "_a", "_v")}
    linear = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    blocks = [f"blocks_a.{i}" for i in range(11)] + ["blocks_u.0"]
    modules = {f"{block}.{part}" for block in blocks for part in norms | linear} | {"patch_embed_a.proj", "norm_a"}
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")} | {"pos_embed_a", "modality_a"}
    assert set(encoder.layers.state_dict()) == names
    assert encoder.layers.pos_embed_a.shape == (1, 512, 768)
    assert encoder.layers.patch_embed_a.proj.weight.shape == (768, 1, 16, 16)
    assert [encoder.output_length(n) for n in (1, 160_000, 10**7)] == [512] * 3
    assert (encoder.width, encoder.frame_rate, encoder.training) == (768, 50.0, False)


def test_pooling_shortens_the_time_steps_of_each_row() -> None:
    plain, pooled = CavMaeEncoder(SPEC), CavMaeEncoder(SPEC.model_copy(update={"pool": 2}))
    assert (pooled.output_length(9000), pooled.frame_rate) == (12, plain.frame_rate / 2)
    with torch.inference_mode():
        frames, halves = plain(clips(7000))[0], pooled(clips(7000))[0]
        whole = CavMaeEncoder(SPEC.model_copy(update={"pool": 0}))(clips(7000))[0]
    assert torch.allclose(halves.view(4, 3, 16), frames.view(4, 3, 2, 16).mean(2), atol=1e-6)
    assert torch.allclose(whole, frames.mean(0, keepdim=True), atol=1e-6)


# ---- the front end ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_hanning_fbank_equals_transformers() -> None:
    clip = clips(8123)[0]
    theirs, _ = kaldi_by_transformers(clip, "hann")
    mine = kaldi_fbank(clip, window="hanning").numpy()
    assert mine.shape == theirs.shape == (49, 128)
    assert np.abs(mine - theirs).max() < 0.02  # float32 against float64, in the quietest cells
    assert np.abs(mine - theirs).mean() < 1e-4


def test_spectrum_is_padded_before_it_is_normalised_and_has_no_offset() -> None:
    encoder = CavMaeEncoder(SPEC)
    short, long = clips(4000, 20000)
    spectrum = encoder.spectrum(short)
    assert spectrum.shape == (48, 32)
    assert torch.allclose(spectrum[23:], torch.full((25, 32), 5.081 / 4.4849))
    assert pytest.approx(1.1329, abs=1e-4) == 5.081 / 4.4849
    expected = (kaldi_fbank(short - short.mean(), 32, "hanning") + 5.081) / 4.4849
    assert torch.allclose(spectrum[:23], expected, atol=1e-5)
    assert torch.allclose(encoder.spectrum(short + 0.3), spectrum, atol=1e-2)
    cut = kaldi_fbank(long - long.mean(), 32, "hanning")[:48]
    assert torch.allclose(encoder.spectrum(long), (cut + 5.081) / 4.4849, atol=1e-5)
    assert torch.isfinite(encoder.spectrum(torch.zeros(0))).all()


def test_positions_tell_time_in_the_first_half_and_frequency_in_the_second() -> None:
    positions = grid_positions(8, 64, 768)
    assert positions.shape == (512, 768)
    row, step, i = 5, 37, 100
    at = positions[row * 64 + step]
    rate = 10_000 ** (-i / 192)
    assert at[i].item() == pytest.approx(math.sin(step * rate), abs=1e-6)
    assert at[192 + i].item() == pytest.approx(math.cos(step * rate), abs=1e-6)
    assert at[384 + i].item() == pytest.approx(math.sin(row * rate), abs=1e-6)
    assert at[576 + i].item() == pytest.approx(math.cos(row * rate), abs=1e-6)


def test_tokens_go_through_frequency_rows_low_first() -> None:
    """A patch is what the convolution's weights make of one 8 x 8 square of the spectrogram, frequency down."""
    encoder = CavMaeEncoder(SPEC)
    spectrum = encoder.spectrum(clips(8000)[0])
    tokens = encoder.layers.patch_embed_a(spectrum.T[None, None])[0]
    row, step = 2, 4
    square = spectrum[step * 8 : step * 8 + 8, row * 8 : row * 8 + 8].T
    own = encoder.layers.state_dict()
    expected = (own["patch_embed_a.proj.weight"][:, 0] * square).sum((1, 2)) + own["patch_embed_a.proj.bias"]
    assert tokens.shape == (TOKENS, 16)
    assert torch.allclose(tokens[row * 6 + step], expected, atol=1e-5)


# ---- the blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_a_block_equals_a_torch_encoder_layer_with_the_norms_of_its_branch(joint: bool) -> None:
    torch.manual_seed(0)
    block = Block(CavMaeConfig.model_validate(TINY))
    for norm in (m for m in block.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    theirs = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    end = "_a" if joint else ""
    pairs = {
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj.": "attn.proj.",
        "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.",
        "norm1.": f"norm1{end}.",
        "norm2.": f"norm2{end}.",
    }
    own = block.state_dict()
    theirs.load_state_dict({a + kind: own[b + kind] for a, b in pairs.items() for kind in ("weight", "bias")})
    tokens = torch.randn(2, TOKENS, 16)
    with torch.no_grad():
        got = block(tokens, joint)
        assert (got - theirs(tokens)).abs().max() < 1e-5
    assert torch.equal(block(tokens, joint), got)  # the zero gradients of the other norms change no value


def test_only_the_last_block_is_joint_and_a_layer_can_be_kept() -> None:
    clip = clips(6000)
    encoder = CavMaeEncoder(SPEC)
    kept = [CavMaeEncoder(SPEC.model_copy(update={"layer": k})) for k in (2, 3)]
    spectra = encoder.spectrum(clip[0])[None]
    layers = encoder.layers
    with torch.inference_mode():
        tokens = layers.patch_embed_a(spectra.transpose(1, 2)[:, None]) + layers.pos_embed_a + layers.modality_a
        second = layers.blocks_a[1](layers.blocks_a[0](tokens, False), False)
        third = layers.blocks_u[0](second, True)
        assert torch.allclose(kept[0](clip)[0], second[0], atol=1e-6)
        assert torch.allclose(kept[1](clip)[0], third[0], atol=1e-6)
        assert torch.allclose(encoder(clip)[0], layers.norm_a(third)[0], atol=1e-6)


# ---- batches and training ---------------------------------------------------------------------------------------


def test_a_padded_batch_equals_each_clip_alone_and_the_padding_does_not_matter() -> None:
    encoder = CavMaeEncoder(SPEC)
    batch = clips(9000, 1, 399, 401, 40000)
    with torch.inference_mode():
        together = encoder(batch)
        alone = [encoder([clip])[0] for clip in batch]
        padded = nn.utils.rnn.pad_sequence(batch[:3], batch_first=True)
        lengths = torch.tensor([9000, 1, 399])
        loud = padded.clone()
        loud[1, 1:] = loud[2, 399:] = 0.7
        assert torch.equal(encoder.encode(padded, lengths), encoder.encode(loud, lengths))
    for clip, one, other in zip(batch, together, alone, strict=True):
        assert one.shape == other.shape == (encoder.output_length(len(clip)), 16) == (TOKENS, 16)
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() < 1e-5
    assert not torch.allclose(together[0], together[4], atol=1e-2)


def test_gradients_reach_what_is_used_and_are_zero_for_the_image_branch() -> None:
    encoder = CavMaeEncoder(SPEC).train()
    torch.stack(encoder(clips(5000, 8000))).square().mul(torch.arange(1.0, 17.0)).sum().backward()
    idle = ("_v.", *(f"blocks_a.{i}.norm{k}_a." for i in (0, 1) for k in (1, 2)), "u.0.norm1.", "u.0.norm2.")
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().max() > 0) != any(part in name for part in idle), name


def test_weights_come_from_the_seed() -> None:
    digests = [CavMaeEncoder(SPEC.model_copy(update={"seed": s})).describe()["weights"] for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_description_states_the_front_end() -> None:
    described = CavMaeEncoder(SPEC).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["preprocessing"] == {
        "input": "waveform",
        "sample_rate": 16000,
        "waveform": "mean subtracted",
        "order": "frequency, then time",
        "fbank": {
            "kind": "kaldi",
            "window": "hanning",
            "bins": 32,
            "frames": 48,
            "padding": "zeros, then normalised",
            "mean": -5.081,
            "deviation": 4.4849,
        },
    }


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "base_model.model.model.audio_encoder."])
def test_a_public_checkpoint_is_read_without_its_other_parts(tmp_path: Path, prefix: str) -> None:
    source = CavMaeEncoder(SPEC.model_copy(update={"seed": 5}))
    state = {prefix + name: value for name, value in source.layers.state_dict().items()}
    images = ("pos_embed_v", "modality_v", "blocks_v.0.norm1.weight", "norm_v.bias", "norm.bias", "mlp_head.0.weight")
    state |= {prefix + name: torch.zeros(3) for name in images} | {"model.layers.0.weight": torch.zeros(2)}
    path = tmp_path / "audio_model.pth"
    torch.save(state, path)
    read = CavMaeEncoder(EncoderSpec(kind="cavmae", config=TINY, weights=str(path)))
    with torch.inference_mode():
        assert torch.equal(read(clips(6000))[0], source(clips(6000))[0])


def test_a_folder_with_its_sizes_is_read(tmp_path: Path) -> None:
    source = CavMaeEncoder(SPEC.model_copy(update={"seed": 5}))
    save_file(source.layers.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "cavmae"}))
    read = CavMaeEncoder(EncoderSpec(kind="cavmae", weights=str(tmp_path)))
    with torch.inference_mode():
        assert torch.equal(read(clips(6000))[0], source(clips(6000))[0])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audio_model.pth"
    spec = EncoderSpec(kind="cavmae", config=TINY, weights=str(path))
    with pytest.raises(FileNotFoundError, match=r"audio_model\.pth; download"):
        CavMaeEncoder(spec)
    state = CavMaeEncoder(SPEC).layers.state_dict()
    torch.save({"pos_embed_v": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"audio_model\.pth holds no CAV-MAE audio encoder"):
        CavMaeEncoder(spec)
    torch.save({name: value for name, value in state.items() if name != "blocks_u.0.norm1_a.bias"}, path)
    with pytest.raises(ValueError, match=r"does not fit the encoder: (.|\n)*blocks_u\.0\.norm1_a\.bias"):
        CavMaeEncoder(spec)
    torch.save(state | {"blocks_a.2.norm1.bias": torch.zeros(16)}, path)
    with pytest.raises(ValueError, match=r"does not fit the encoder: (.|\n)*blocks_a\.2\.norm1\.bias"):
        CavMaeEncoder(spec)
    torch.save({"model": state, "extra": Path("x")}, path)
    with pytest.raises(ValueError, match=r"audio_model\.pth holds more than tensors and plain values"):
        CavMaeEncoder(spec)


def test_wrong_sizes_are_refused() -> None:
    for change, message in (
        ({"audio_length": 50}, "multiples of patch_size"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"modality_specific_depth": 4}, "must not exceed depth"),
        ({"frames": 1}, "frames"),
    ):
        with pytest.raises(ValueError, match=message):
            CavMaeEncoder(EncoderSpec(kind="cavmae", config=TINY | change))
    with pytest.raises(ValueError, match="between 1 and 3"):
        CavMaeEncoder(SPEC.model_copy(update={"layer": 4}))
