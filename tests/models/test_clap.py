"""Microsoft CLAP's HTSAT: the front end, the windows, the public names, and one vector a window."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from models.encoders.base import EncoderSpec
from models.encoders.clap import ClapEncoder, Projection
from models.encoders.clap_frontend import Windows, log_mel, mel_filters, peak_normalise, resample, resampled_length
from models.encoders.htsat import from_htsat, htsat_ignored, htsat_renames, is_htsat
from tests.models.encoder_helpers import clips

SIZES = {
    "spec_size": 32,
    "num_mel_bins": 16,
    "window_size": 4,
    "patch_embeds_hidden_size": 8,
    "depths": [2, 1],
    "num_attention_heads": [2, 4],
}
TINY = SIZES | {"window_seconds": 0.4, "hop_seconds": 0.1, "projection": 12}
PENGI = EncoderSpec(kind="clap", config=TINY)
FLAMINGO = EncoderSpec(kind="clap", config=TINY | {"windows": 5, "peak_normalise": True})


# ---- the published shape ----------------------------------------------------------------------------------------


def block_count(width: int, heads: int) -> int:
    norms, attention, inner = 4 * width, 4 * width**2 + 4 * width + 15**2 * heads, 8 * width**2 + 5 * width
    return norms + attention + inner


def test_published_counts_and_lengths() -> None:
    with torch.device("meta"):
        pengi = ClapEncoder(EncoderSpec(kind="clap"))
        bare = ClapEncoder(EncoderSpec(kind="clap", config={"projection": 0}))
        flamingo = ClapEncoder(EncoderSpec(kind="clap", config={"windows": 16}))
    stages = ((96, 4, 2), (192, 8, 2), (384, 16, 6), (768, 32, 2))
    swin = sum(depth * block_count(width, heads) for width, heads, depth in stages)
    merging = sum(8 * width**2 + 8 * width for width in (96, 192, 384))
    rest = 2 * 64 + (16 * 96 + 96) + 2 * 96 + 2 * 768
    projection = 768 * 1024 + 1024 * 1024 + 2 * 1024
    assert sum(p.numel() for p in bare.parameters()) == swin + merging + rest == 27_534_488
    assert sum(p.numel() for p in pengi.parameters()) == 27_534_488 + projection == 29_371_544
    assert {p.device.type for p in pengi.parameters()} == {"meta"}
    assert (pengi.width, bare.width, pengi.training) == (1024, 768, False)
    assert pengi.frame_rate == pytest.approx(1 / 7)
    assert flamingo.frame_rate == pytest.approx(1 / 1.75)
    assert [pengi.output_length(16_000 * s) for s in (1, 7, 30)] == [1, 1, 1]
    seconds = (0, 7, 8.75, 8.76, 33.25 - 1.75, 33.25, 600)
    assert [flamingo.output_length(round(16_000 * s)) for s in seconds] == [1, 1, 2, 3, 15, 16, 16]
    with pytest.raises(ValueError, match=r"between 0\.023 and 7\.430 for a spectrogram of 1024 frames"):
        ClapEncoder(EncoderSpec(kind="clap", config={"window_seconds": 10}))


# ---- the front end ----------------------------------------------------------------------------------------------


def test_seven_seconds_are_965_frames_and_silence_is_minus_100_decibels() -> None:
    spectra = log_mel(torch.zeros(1, 308_700))
    assert spectra.shape == (1, 965, 64)
    assert torch.equal(spectra, torch.full_like(spectra, -100.0))


def test_log_mel_equals_transformers_at_its_own_rate_of_32_khz() -> None:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(sampling_rate=32_000, hop_length=320, frequency_min=50, frequency_max=14_000)
    clip = clips(20_000)[0]
    theirs = extractor._np_extract_fbank_features(clip.numpy().astype(np.float64), extractor.mel_filters_slaney)
    mine = log_mel(clip[None])[0].numpy()
    assert mine.shape == theirs.shape == (63, 64)
    assert np.abs(mine - theirs).max() < 1e-3
    assert np.array_equal(mel_filters(64, torch.device("cpu")).numpy(), extractor.mel_filters_slaney.astype(np.float32))


def test_a_tone_lands_where_the_32_khz_filters_put_a_44_khz_signal() -> None:
    """1 kHz at 44.1 kHz is FFT bin 23.2, which the filters take for 726 Hz: the published mismatch."""
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    wide = resample(tone)
    spectrum = log_mel(wide[None])[0, 50]
    filters = mel_filters(64, torch.device("cpu"))
    centres = 31.25 * (torch.arange(513.0) @ filters) / filters.sum(0)
    assert centres[spectrum.argmax()].item() == pytest.approx(1000 * 32_000 / 44_100, abs=40)  # filters are 54 Hz apart
    turns = 2 * torch.pi * 1000 * torch.arange(44_100) / 44_100
    assert (wide[1000:-1000] - turns.sin()[1000:-1000]).abs().max() < 1e-3


def test_resampled_lengths_are_known_without_resampling() -> None:
    lengths = [1, 2, 159, 160, 161, 16_000, 112_000]
    assert [len(resample(torch.ones(n))) for n in lengths] == [resampled_length(n) for n in lengths]
    assert [resampled_length(n) for n in lengths] == [3, 6, 439, 441, 444, 44_100, 308_700]


def test_windows_repeat_one_and_pad_several() -> None:
    ramp = torch.arange(1.0, 8.0)
    assert Windows(1, 10, 4).cut(ramp, 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 1, 2, 3]]
    assert Windows(1, 5, 4).cut(ramp, 1).tolist() == [[1, 2, 3, 4, 5]]
    assert Windows(3, 4, 2).cut(ramp, 3).tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]
    assert Windows(3, 4, 2).cut(ramp, 2).tolist() == [[1, 2, 3, 4], [3, 4, 5, 6]]


def test_a_peak_normalised_clip_has_16_bit_values_and_silence_stays() -> None:
    assert peak_normalise(torch.tensor([0.1, -0.2, 0.05])).tolist() == pytest.approx([16383 / 32767, -1, 8191 / 32767])
    assert peak_normalise(torch.zeros(4)).tolist() == [0, 0, 0, 0]
    encoder = ClapEncoder(FLAMINGO)
    clip = clips(9000)[0]
    with torch.inference_mode():
        assert torch.allclose(encoder([clip])[0], encoder([clip * 0.25])[0], atol=1e-3)


# ---- the transformer and its projection -------------------------------------------------------------------------


def test_the_spectrogram_is_stretched_and_folded_to_a_square() -> None:
    """44.1 kHz x 0.4 s are 56 frames: stretched to 64, then the two halves stand one above the other."""
    encoder = ClapEncoder(PENGI)
    seen: list[Tensor] = []
    encoder.layers.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens: list[Tensor] = []
    encoder.layers.norm.register_forward_hook(lambda _, __, output: tokens.append(output))
    window = encoder.cut(clips(9000)[0])
    assert window.shape == (1, 17_640)
    with torch.inference_mode():
        spectrum = log_mel(window, 16)
        vector = encoder.embed(window)
        expected = encoder.projection(tokens[0].mean(1))
    assert spectrum.shape == (1, 56, 16)
    stretched = functional.interpolate(spectrum[None], (64, 16), mode="bicubic", align_corners=True)[0, 0]
    image = torch.cat([stretched[:32].T, stretched[32:].T])
    assert (seen[0][0, 0] - image).abs().max() < 1e-2  # batch norm's epsilon on values up to 100
    assert tokens[0].shape == (1, 16, 16)
    assert torch.allclose(vector, expected, atol=1e-5)


def test_projection_is_published_arithmetic_and_its_dropout_rests_in_evaluation() -> None:
    torch.manual_seed(0)
    projection = Projection(6, 10).eval()
    pooled = torch.randn(3, 6)
    first = pooled @ projection.linear1.weight.T
    summed = first + functional.gelu(first) @ projection.linear2.weight.T
    expected = (summed - summed.mean(1, keepdim=True)) / (summed.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert torch.allclose(projection(pooled), expected, atol=1e-5)
    projection.train()
    assert not torch.equal(projection(pooled), projection(pooled))


# ---- batches and training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [PENGI, FLAMINGO, FLAMINGO.model_copy(update={"window": True, "pool": 2})])
def test_a_padded_batch_equals_each_clip_alone(spec: EncoderSpec) -> None:
    encoder = ClapEncoder(spec)
    batch = clips(9000, 1, 399, 6400, 6401, 40000)
    with torch.inference_mode():
        together = encoder(batch)
        alone = [encoder([clip])[0] for clip in batch]
    for clip, one, other in zip(batch, together, alone, strict=True):
        assert one.shape == other.shape == (encoder.output_length(len(clip)), 12)
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() < 1e-4
    counts = [len(frames) for frames in together]
    assert counts == ([1] * 6 if spec == PENGI else [3] * 6 if spec.window else [3, 1, 1, 1, 2, 5])
    assert not torch.allclose(together[0][0], together[5][0], atol=1e-2)


def test_padding_and_what_lies_after_the_windows_do_not_matter() -> None:
    encoder = ClapEncoder(FLAMINGO)
    lengths = torch.tensor([500, 5000])
    silent = nn.utils.rnn.pad_sequence(clips(500, 5000), batch_first=True)
    loud = silent.clone()
    loud[0, 500:] = 0.7
    long = clips(30_000)[0]
    with torch.inference_mode():
        assert torch.equal(encoder.encode(silent, lengths), encoder.encode(loud, lengths))
        assert torch.equal(encoder([long])[0], encoder([long[: round(0.8 * 16_000)]])[0])


def test_absent_windows_are_silent_where_all_are_kept() -> None:
    encoder = ClapEncoder(FLAMINGO.model_copy(update={"window": True}))
    with torch.inference_mode():
        frames = encoder(clips(6400))[0]
        silence = encoder.embed(torch.zeros(1, 17_640))[0]
    assert frames.shape == (5, 12)
    assert torch.allclose(frames[4], silence, atol=1e-5)
    assert not torch.allclose(frames[0], silence, atol=1e-2)


def test_gradients_reach_every_parameter_and_batch_norm_keeps_its_statistics() -> None:
    encoder = ClapEncoder(PENGI).train()
    assert encoder.projection.training
    assert not encoder.layers.batch_norm.training
    before = encoder.layers.batch_norm.running_mean.clone()
    torch.cat(encoder(clips(5000, 8000))).square().mul(torch.arange(1.0, 13.0)).sum().backward()
    assert torch.equal(encoder.layers.batch_norm.running_mean, before)
    assert encoder.layers.batch_norm.weight.grad is not None
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().max() > 0), name


def test_a_frozen_encoder_has_no_dropout_in_training() -> None:
    encoder = ClapEncoder(PENGI).requires_grad_(False)
    expected = encoder(clips(5000))[0]
    assert torch.equal(encoder.train()(clips(5000))[0], expected)
    encoder.projection.requires_grad_(True)
    assert not torch.allclose(encoder.train()(clips(5000))[0], expected, atol=1e-3)


def test_weights_come_from_the_seed() -> None:
    digests = [ClapEncoder(PENGI.model_copy(update={"seed": s})).describe()["weights"] for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_description_states_the_front_end() -> None:
    described = ClapEncoder(FLAMINGO).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["preprocessing"] == {
        "input": "waveform",
        "sample_rate": 16000,
        "resampled": 44100,
        "resampler": "soxr HQ",
        "mel": {"fft": 1024, "hop": 320, "low": 50.0, "high": 14000.0, "filters_for": 32000, "kind": "slaney, dB"},
        "bins": 16,
        "windows": {"most": 5, "size": 17640, "hop": 4410, "padding": "zeros", "peak_normalise": True},
    }


# ---- public names -----------------------------------------------------------------------------------------------


def htsat_shapes(
    dim: int, depths: list[int], heads: list[int], window: int, bins: int
) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of the official module, as Pengi's checkpoint has them under `audio_encoder.base.htsat.`."""
    yield from ((f"bn0.{kind}", [bins]) for kind in ("weight", "bias", "running_mean", "running_var"))
    yield from (("bn0.num_batches_tracked", []), ("patch_embed.proj.weight", [dim, 1, 4, 4]))
    yield from ((f"patch_embed.{name}", [dim]) for name in ("proj.bias", "norm.weight", "norm.bias"))
    for stage, (depth, number) in enumerate(zip(depths, heads, strict=True)):
        width = dim * 2**stage
        for block in range(depth):
            own = f"layers.{stage}.blocks.{block}."
            for name, rows, columns in (
                ("attn.qkv", 3 * width, width),
                ("attn.proj", width, width),
                ("mlp.fc1", 4 * width, width),
                ("mlp.fc2", width, 4 * width),
            ):
                yield from ((f"{own}{name}.weight", [rows, columns]), (f"{own}{name}.bias", [rows]))
            yield from ((f"{own}{norm}.{kind}", [width]) for norm in ("norm1", "norm2") for kind in ("weight", "bias"))
            yield f"{own}attn.relative_position_bias_table", [(2 * window - 1) ** 2, number]
            yield f"{own}attn.relative_position_index", [window**2, window**2]
            if block % 2:
                yield f"{own}attn_mask", [4, window**2, window**2]
        if stage < len(depths) - 1:
            merging = f"layers.{stage}.downsample."
            yield from ((f"{merging}norm.{kind}", [4 * width]) for kind in ("weight", "bias"))
            yield f"{merging}reduction.weight", [2 * width, 4 * width]
    wide = dim * 2 ** (len(depths) - 1)
    yield from ((f"norm.{kind}", [wide]) for kind in ("weight", "bias"))
    yield from (("tscam_conv.weight", [527, wide, 2, 3]), ("tscam_conv.bias", [527]), ("head.weight", [527, 527]))
    yield from ((f"spectrogram_extractor.stft.conv_{part}.weight", [513, 1, 1024]) for part in ("real", "imag"))


def pengi_state(
    dim: int, depths: list[int], heads: list[int], window: int, bins: int, out: int, prefix: str = ""
) -> dict[str, Tensor]:
    wide = dim * 2 ** (len(depths) - 1)
    state = {
        f"{prefix}audio_encoder.base.htsat.{name}": torch.randn(shape)
        for name, shape in htsat_shapes(dim, depths, heads, window, bins)
    }
    state = {n: v.abs().long() % 7 if n.endswith(("index", "tracked")) else v for n, v in state.items()}
    for part, width in (("audio_encoder", wide), ("caption_encoder", 5)):
        shapes = {"linear1.weight": [out, width], "linear2.weight": [out, out]}
        shapes |= {"layer_norm.weight": [out], "layer_norm.bias": [out]}
        state |= {f"{prefix}{part}.projection.{name}": torch.randn(shape) for name, shape in shapes.items()}
    with torch.device("cpu"):
        filters = mel_filters(bins, torch.device("cpu")).clone()
    state[f"{prefix}audio_encoder.base.htsat.logmel_extractor.melW"] = filters
    return state | {f"{prefix}caption_decoder.gpt.transformer.wte.weight": torch.randn(3, 2)}


def tiny_state(prefix: str = "") -> dict[str, Tensor]:
    state = pengi_state(8, [2, 1], [2, 4], 4, 16, 12, prefix)
    index = ClapEncoder(PENGI).layers.layers[0].blocks[0].attention.self.relative_position_index
    return {
        name: index if name.endswith("_index") else value.abs() if name.endswith("running_var") else value
        for name, value in state.items()
    }


def test_every_published_name_of_pengi_has_its_place() -> None:
    with torch.device("meta"):
        encoder = ClapEncoder(EncoderSpec(kind="clap"))
        state = pengi_state(96, [2, 2, 6, 2], [4, 8, 16, 32], 8, 64, 1024)
    named = from_htsat(state)
    own = encoder.state_dict()
    assert {name: value.shape for name, value in named.items()} == {name: value.shape for name, value in own.items()}
    dropped = ("tscam_conv", "head.", "_extractor", "attn_mask", "caption_")
    kept = [value for name, value in state.items() if not any(part in name for part in dropped)]
    assert sum(value.numel() for value in named.values()) == sum(value.numel() for value in kept)
    learned = {name for name, _ in encoder.named_parameters()}
    assert sum(value.numel() for name, value in named.items() if name in learned) == 29_371_544
    assert len(kept) == 5 + 4 + 12 * 14 + 3 * 3 + 2 + 4 == 192
    assert len(named) == 192 + 12 * 2 * 2  # query, key and value of twelve blocks, weight and bias


def test_an_attention_block_under_the_new_names_computes_what_the_old_names_say() -> None:
    torch.manual_seed(1)
    state = tiny_state()
    encoder = ClapEncoder(PENGI)
    encoder.load_state_dict(from_htsat(state))
    start = "audio_encoder.base.htsat.layers.0.blocks.0."
    old = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}

    def linear(inputs: Tensor, name: str) -> Tensor:
        return functional.linear(inputs, old[f"{name}.weight"], old[f"{name}.bias"])

    def norm(inputs: Tensor, name: str) -> Tensor:
        return functional.layer_norm(inputs, [8], old[f"{name}.weight"], old[f"{name}.bias"])

    tokens = torch.randn(1, 64, 8)
    windows = norm(tokens, "norm1").view(2, 4, 2, 4, 8).transpose(1, 2).reshape(4, 16, 8)
    query, key, value = linear(windows, "attn.qkv").view(4, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    at = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4])
    apart = at[:, :, None] - at[:, None, :] + 3
    bias = old["attn.relative_position_bias_table"][apart[0] * 7 + apart[1]].permute(2, 0, 1)
    attended = ((query * 4**-0.5) @ key.transpose(-2, -1) + bias).softmax(-1) @ value
    mixed = linear(attended.transpose(1, 2).reshape(4, 16, 8), "attn.proj")
    after = tokens + mixed.view(2, 2, 4, 4, 8).transpose(1, 2).reshape(1, 64, 8)
    expected = after + linear(functional.gelu(linear(norm(after, "norm2"), "mlp.fc1")), "mlp.fc2")
    with torch.inference_mode():
        got = encoder.layers.layers[0].blocks[0](tokens, (8, 8))[0]
    assert (got - expected).abs().max() < 1e-3


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_public_checkpoint_is_read(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "base.pth"
    state = tiny_state(prefix)
    torch.save({"model": state, "epoch": 3}, path)
    read = ClapEncoder(EncoderSpec(kind="clap", config=TINY, weights=str(path)))
    second = state[f"{prefix}audio_encoder.projection.linear2.weight"]
    assert torch.equal(read.state_dict()["projection.linear2.weight"], second)
    bare = ClapEncoder(EncoderSpec(kind="clap", config=TINY | {"projection": 0}, weights=str(path)))
    assert (bare.width, bare(clips(3000))[0].shape) == (16, (1, 16))
    assert torch.equal(bare.layers.norm.bias, state[f"{prefix}audio_encoder.base.htsat.norm.bias"])


def test_the_captioner_keeps_its_audio_encoder_under_another_name() -> None:
    state = {name.replace("audio_encoder.", "clap."): value for name, value in tiny_state().items()}
    assert is_htsat(state)
    assert set(from_htsat(state)) == set(ClapEncoder(PENGI).state_dict())


def test_the_renames_serve_the_import_of_a_whole_architecture() -> None:
    from models.checkpoints import Checkpoint, map_state

    theirs, ours = r"audio_encoder\.base\.htsat\.", "encoders.audio.layers."
    checkpoint = Checkpoint("base.pth", htsat_renames(theirs, ours), ignored=htsat_ignored(theirs))
    state = tiny_state("module.")
    mapped, unknown = map_state(checkpoint, state)
    expected = {n: v for n, v in from_htsat(state).items() if n.startswith("layers.")}
    assert set(mapped) == {f"encoders.audio.{name}" for name in expected}
    assert all(torch.equal(mapped[f"encoders.audio.{name}"], value) for name, value in expected.items())
    assert all("projection" in name or "caption" in name for name in unknown)


def test_a_folder_with_its_sizes_is_read(tmp_path: Path) -> None:
    source = ClapEncoder(PENGI.model_copy(update={"seed": 5}))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    read = ClapEncoder(EncoderSpec(kind="clap", weights=str(tmp_path)))
    with torch.inference_mode():
        assert torch.equal(read(clips(6000))[0], source(clips(6000))[0])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.pth"
    spec = EncoderSpec(kind="clap", config=TINY, weights=str(path))
    state = tiny_state()
    missing = "audio_encoder.base.htsat.layers.1.blocks.0.attn.qkv.bias"
    torch.save({"model": {name: value for name, value in state.items() if name != missing}}, path)
    with pytest.raises(ValueError, match=r"base\.pth does not fit the encoder: (.|\n)*attention\.self\.key\.bias"):
        ClapEncoder(spec)
    torch.save({"model": state | {"audio_encoder.base.htsat.absolute_pos_embed": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"HTSAT with '.*absolute_pos_embed' is not supported"):
        ClapEncoder(spec)
    with pytest.raises(ValueError, match="no weights of Microsoft CLAP's HTSAT"):
        from_htsat({"audio_encoder.conv1.weight": torch.zeros(1)})
    state["audio_encoder.base.htsat.logmel_extractor.melW"] *= 1.1
    with pytest.raises(ValueError, match="are not the front end's filters"):
        from_htsat(state)


def test_wrong_settings_are_refused() -> None:
    for change, message in (
        ({"frames": 1, "windows": 2}, "unknown entries of clap's config: frames"),
        ({"windows": 0}, "windows"),
        ({"enable_fusion": True}, "enable_fusion is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            ClapEncoder(EncoderSpec(kind="clap", config=TINY | change))
    with pytest.raises(ValueError, match="leave layer empty, not 2"):
        ClapEncoder(PENGI.model_copy(update={"layer": 2}))
