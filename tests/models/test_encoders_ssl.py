"""Encoders that learnt without labels, and Parakeet: HuBERT, WavLM, MERT, w2v-BERT; each against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soxr
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from models.encoders import AudioEncoder, EncoderSpec, build_encoder
from models.encoders.frontend import nemo_mel
from models.encoders.hubert import WaveformTransformer
from models.encoders.mert import resample, resampled_length
from models.encoders.parakeet import ParakeetEncoder
from models.encoders.w2vbert import W2vBertEncoder
from tests.models.encoder_helpers import (
    check_a_padded_batch_equals_each_clip_alone,
    check_lengths_are_known_without_running,
    check_what_lies_in_the_padding_does_not_matter,
    clips,
)

WIDTH, DEPTH = 32, 3
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
CONVOLVED = SIZES | {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "hubert": CONVOLVED,
    "wavlm": CONVOLVED,
    "mert": CONVOLVED | {"do_stable_layer_norm": True},
    "w2vbert": SIZES | {"output_hidden_size": WIDTH},
    "parakeet": SIZES | {"subsampling_conv_channels": 8},
}
SPECS = {kind: EncoderSpec(kind=kind, config=config) for kind, config in CONFIGS.items()} | {
    "hubert, normalised": EncoderSpec(kind="hubert", config=CONVOLVED | {"do_normalize": True}, layer=2, pool=2),
    "wavlm, large form": EncoderSpec(
        kind="wavlm", config=CONVOLVED | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    ),
    "mert, one second": EncoderSpec(kind="mert", config=CONVOLVED | {"longest_seconds": 1.0}, pool=4),
    "parakeet, 128 bins": EncoderSpec(kind="parakeet", config=CONFIGS["parakeet"] | {"num_mel_bins": 128}, layer=1),
}


def inside(encoder: AudioEncoder) -> PreTrainedModel:
    """transformers' model in an encoder."""
    found = encoder.layers if isinstance(encoder, ParakeetEncoder) else encoder.model
    assert isinstance(found, PreTrainedModel)
    return found


@pytest.mark.parametrize("name", SPECS)
def test_a_padded_batch_equals_each_clip_alone(name: str) -> None:
    check_a_padded_batch_equals_each_clip_alone(build_encoder(SPECS[name]), clips(9000, 16161, 100, 4001, 894, 24000))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_lies_in_the_padding_does_not_matter(name: str) -> None:
    check_what_lies_in_the_padding_does_not_matter(build_encoder(SPECS[name]), 900)


@pytest.mark.parametrize("name", SPECS)
def test_lengths_are_known_without_running(name: str) -> None:
    lengths = (1, 2, 159, 160, 319, 320, 321, 399, 400, 401, 559, 560, 719, 720, 721, 1279, 1280, 1281, 2799, 32001)
    check_lengths_are_known_without_running(build_encoder(SPECS[name]), *lengths)


def test_published_sizes_and_rates() -> None:
    """HuBERT and WavLM base less the mask embedding (768), which no feature uses; MERT summed by hand."""
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    front = 512 * (10 + 2 + 512 * (4 * 3 + 2 * 2)) + 2 * 512 + 513 * 1024 + (128 + 1024 * 64 * 128 + 1024)
    mert = front + 24 * (4 * 1025 * 1024 + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024) + 2 * 1024
    expected = [  # parameters, frames of ten seconds, frames a second
        (EncoderSpec(kind="hubert"), 94_371_712 - 768, 499, 50.0),
        (EncoderSpec(kind="wavlm", layers=tuple(range(13))), 94_381_936 - 768, 499, 50.0),
        (EncoderSpec(kind="mert", config=large | {"do_stable_layer_norm": True}, pool=0), mert, 1, 75.0),
        (EncoderSpec(kind="w2vbert"), 580_492_096, 499, 50.0),
        (EncoderSpec(kind="parakeet"), 607_749_120, 125, 12.5),
    ]
    with torch.device("meta"):
        for spec, count, frames, rate in expected:
            encoder = build_encoder(spec)
            assert sum(parameter.numel() for parameter in encoder.parameters()) == count, spec.kind
            assert (encoder.output_length(160_000), encoder.frame_rate) == (frames, rate), spec.kind
            assert all(parameter.requires_grad for parameter in encoder.parameters())  # `freeze` decides, nobody else
            assert not encoder.training


@pytest.mark.parametrize("name", ["hubert", "wavlm", "wavlm, large form", "mert"])
def test_waveform_transformers_equal_transformers(name: str) -> None:
    """All hidden states, and the output; transformers 5 gives the last state as its block left it."""
    spec = SPECS[name].model_copy(update={"layers": tuple(range(DEPTH + 1))})
    encoder, default = build_encoder(spec), build_encoder(SPECS[name])
    assert isinstance(encoder, WaveformTransformer)
    clip = clips(20000)[0]
    with torch.inference_mode():
        theirs = encoder.model(encoder.prepare(clip)[None], output_hidden_states=True)
        mine = encoder([clip])[0].split(WIDTH, dim=1)
        assert (default([clip])[0] - theirs.last_hidden_state[0]).abs().max() < 1e-5
    assert len(mine) == len(theirs.hidden_states) == DEPTH + 1
    for one, other in zip(mine, theirs.hidden_states, strict=True):
        assert (one - other[0]).abs().max() < 1e-5


def test_normalisation_is_said_by_the_configuration() -> None:
    clip = clips(20000)[0] + 0.3
    for kind, default in (("hubert", False), ("wavlm", False), ("mert", True)):
        for said in (None, False, True):
            entries = {} if said is None else {"do_normalize": said}
            encoder = build_encoder(EncoderSpec(kind=kind, config=CONFIGS[kind] | entries))
            assert isinstance(encoder, WaveformTransformer)
            heard = encoder.prepare(clip)
            on = default if said is None else said
            assert encoder.preprocessing()["normalised"] == on
            assert (abs(float(heard.mean())) < 1e-4 and abs(float(heard.std()) - 1) < 1e-3) == on


# ---- MERT -------------------------------------------------------------------------------------------------------


def test_mert_hears_at_24_kilohertz() -> None:
    for n in (1, 2, 3, 7, 16000, 16001, 15999):
        assert len(resample(torch.zeros(n))) == resampled_length(n) == -(-3 * n // 2)
    assert len(resample(torch.zeros(0))) == 0
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(24000) / 24000)
    assert (resample(tone) - expected)[500:-500].abs().max() < 1e-3
    assert torch.equal(resample(tone), torch.from_numpy(soxr.resample(tone.numpy(), 16000, 24000)))


def test_mert_hears_its_longest_seconds_only() -> None:
    config = CONFIGS["mert"]
    short = build_encoder(EncoderSpec(kind="mert", config=config | {"longest_seconds": 1.0}))
    whole = build_encoder(EncoderSpec(kind="mert", config=config))
    clip = clips(40000)[0]
    with torch.inference_mode():
        assert torch.equal(short([clip])[0], whole([clip[:16000]])[0])
    assert short.output_length(40000) == short.output_length(10**7) == whole.output_length(16000) == 74
    assert short.seconds_of(10**7) == pytest.approx(1.0, abs=0.02)
    assert short.describe()["preprocessing"]["longest_seconds"] == 1.0


def test_mert_may_normalise_its_last_state() -> None:
    """As transformers 4 did, and so MU-LLaMA's 25th state."""
    layers = tuple(range(DEPTH + 1))
    plain = build_encoder(EncoderSpec(kind="mert", config=CONFIGS["mert"], layers=layers))
    normed = build_encoder(EncoderSpec(kind="mert", config=CONFIGS["mert"] | {"last_normalised": True}, layers=layers))
    clip = clips(9000)
    with torch.inference_mode():
        one, other = plain(clip)[0], normed(clip)[0]
        output = build_encoder(SPECS["mert"])(clip)[0]
    assert torch.equal(one[:, : DEPTH * WIDTH], other[:, : DEPTH * WIDTH])
    assert torch.equal(other[:, DEPTH * WIDTH :], output)
    assert not torch.allclose(one[:, DEPTH * WIDTH :], output, atol=1e-2)


def test_mert_variants_that_v1_is_not_are_refused() -> None:
    for name in ("feature_extractor_cqt", "deepnorm"):
        with pytest.raises(ValueError, match=f"MERT with {name} is not supported"):
            build_encoder(EncoderSpec(kind="mert", config=CONVOLVED | {name: True}))


# ---- Conformers -------------------------------------------------------------------------------------------------


def test_w2vbert_equals_transformers_with_its_front_end() -> None:
    from transformers import SeamlessM4TFeatureExtractor

    encoder = build_encoder(SPECS["w2vbert"].model_copy(update={"layers": tuple(range(DEPTH + 1))}))
    assert isinstance(encoder, W2vBertEncoder)
    batch = clips(9000, 16161)
    given = SeamlessM4TFeatureExtractor()([c.numpy() for c in batch], sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        theirs = inside(encoder)(**given, output_hidden_states=True)
        mine = encoder(batch)
    assert given["attention_mask"].sum(dim=1).tolist() == [len(frames) for frames in mine] == [27, 49]
    for i, frames in enumerate(mine):
        bank = given["input_features"][i, : len(frames)].float()
        assert (encoder.bank(batch[i]) - bank).abs().max() < 1e-3  # float32 against float64
        for k, state in enumerate(frames.split(WIDTH, dim=1)):
            assert (state - theirs.hidden_states[k][i, : len(frames)]).abs().max() < 1e-3


def test_parakeet_equals_transformers_with_its_front_end() -> None:
    from transformers import ParakeetFeatureExtractor

    encoder = build_encoder(SPECS["parakeet"].model_copy(update={"layers": tuple(range(DEPTH + 1))}))
    batch = clips(9000, 16161)
    given = ParakeetFeatureExtractor()([c.numpy() for c in batch], sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        theirs = inside(encoder)(**given, output_hidden_states=True)
        mine = encoder(batch)
    assert [len(frames) for frames in mine] == theirs.attention_mask.sum(dim=1).tolist() == [7, 13]
    for i, frames in enumerate(mine):
        size = len(batch[i]) // 160
        assert (nemo_mel(batch[i]) - given["input_features"][i, :size]).abs().max() < 1e-4
        for k, state in enumerate(frames.split(WIDTH, dim=1)):
            assert (state - theirs.hidden_states[k][i, : len(frames)]).abs().max() < 1e-4


def test_w2vbert_with_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="adapter is not supported"):
        build_encoder(EncoderSpec(kind="w2vbert", config=CONFIGS["w2vbert"] | {"add_adapter": True}))


# ---- weights from files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_read_from_a_folder(name: str, tmp_path: Path) -> None:
    source = build_encoder(SPECS[name].model_copy(update={"seed": 5}))
    inside(source).save_pretrained(tmp_path)
    read = build_encoder(EncoderSpec(kind=name, weights=str(tmp_path)))
    clip = clips(6000)
    with torch.inference_mode():
        assert torch.equal(read(clip)[0], source(clip)[0])
        assert not torch.equal(build_encoder(SPECS[name])(clip)[0], source(clip)[0])
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = next(weight for weight in sorted(weights) if "layers.1" in weight)
    save_file({n: v for n, v in weights.items() if n != lost}, file)
    with pytest.raises(ValueError, match=rf"(?s){tmp_path.name} does not fit the encoder.*{lost}"):
        build_encoder(EncoderSpec(kind=name, weights=str(tmp_path)))


def test_mert_is_read_as_it_was_published(tmp_path: Path) -> None:
    """Weight normalisation under its older names, a mask embedding, and a configuration of its own kind."""
    source = build_encoder(SPECS["mert"].model_copy(update={"seed": 5}))
    older = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = {"masked_spec_embed": torch.zeros(WIDTH)}
    for name, value in inside(source).state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        weights[name] = value.contiguous()
    assert "encoder.pos_conv_embed.conv.weight_g" in weights
    save_file(weights, tmp_path / "model.safetensors")
    said = {
        "model_type": "mert_model",
        "architectures": ["MERTModel"],
        "auto_map": {"AutoModel": "modeling_MERT.MERTModel"},
        "attention_relax": 32.0,
        "deepnorm": False,
        "feature_extractor_cqt": False,
        "mask_time_prob": 0.05,
    }
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["mert"] | said))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 24000}')
    clip = clips(6000)
    with torch.inference_mode():
        assert torch.equal(build_encoder(EncoderSpec(kind="mert", weights=str(tmp_path)))(clip)[0], source(clip)[0])


def test_parakeet_is_read_from_a_recogniser(tmp_path: Path) -> None:
    from transformers import ParakeetCTCConfig, ParakeetForCTC

    torch.manual_seed(2)
    whole = ParakeetForCTC(ParakeetCTCConfig(encoder_config=CONFIGS["parakeet"], vocab_size=9, pad_token_id=8)).eval()
    whole.save_pretrained(tmp_path)
    read = build_encoder(EncoderSpec(kind="parakeet", weights=str(tmp_path)))
    clip = clips(9000)[0]
    with torch.inference_mode():
        theirs = whole.encoder(nemo_mel(clip)[None]).last_hidden_state[0]
        assert (read([clip])[0] - theirs).abs().max() < 1e-5
