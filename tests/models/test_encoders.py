"""Every encoder: lengths without running, a padded batch equals each clip alone, the published arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.encoders import EncoderSpec, build_encoder
from models.encoders.beats import Attention, BeatsConfig, BeatsEncoder
from models.encoders.frontend import kaldi_fbank, kaldi_filters, kaldi_frames, log_mel, normalise
from tests.models.encoder_helpers import (
    check_a_padded_batch_equals_each_clip_alone,
    check_lengths_are_known_without_running,
    check_what_lies_in_the_padding_does_not_matter,
    clips,
    kaldi_by_transformers,
)

MOONSHINE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 100,
    "num_mel_bins": 80,
    "init_std": 0.2,
}
BEATS = {
    "embed_dim": 16,
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
    "finetuned_model": False,
}
SPECS = {
    "moonshine": EncoderSpec(kind="moonshine", config=MOONSHINE),
    "moonshine, layer 1, pooled": EncoderSpec(kind="moonshine", config=MOONSHINE, layer=1, pool=3),
    "whisper": EncoderSpec(kind="whisper", config=WHISPER),
    "whisper, normalised": EncoderSpec(kind="whisper", config=WHISPER | {"do_normalize": True}, layer=2, pool=2),
    "whisper, window": EncoderSpec(kind="whisper", config=WHISPER, window=True, pool=7),
    "beats": EncoderSpec(kind="beats", config=BEATS),
    "beats, layer 1": EncoderSpec(kind="beats", config=BEATS, layer=1, pool=8),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_padded_batch_equals_each_clip_alone(name: str) -> None:
    check_a_padded_batch_equals_each_clip_alone(build_encoder(SPECS[name]), clips(9000, 16161, 100, 4001, 894, 40000))


@pytest.mark.parametrize("name", ["moonshine", "whisper", "beats"])
def test_what_lies_in_the_padding_does_not_matter(name: str) -> None:
    check_what_lies_in_the_padding_does_not_matter(build_encoder(SPECS[name]), 500)


@pytest.mark.parametrize("name", SPECS)
def test_lengths_are_known_without_running(name: str) -> None:
    lengths = (1, 199, 200, 399, 400, 401, 560, 719, 720, 895, 1278, 1279, 1280, 2799, 2800, 31999, 32000, 32320)
    check_lengths_are_known_without_running(build_encoder(SPECS[name]), *lengths)


def test_lengths_of_ten_seconds_and_nominal_rates() -> None:
    with torch.device("meta"):
        encoders = {kind: build_encoder(EncoderSpec(kind=kind)) for kind in ("moonshine", "whisper", "beats")}
        pooled = build_encoder(EncoderSpec(kind="whisper", pool=4))
        window = build_encoder(EncoderSpec(kind="whisper", window=True))
    assert [encoder.output_length(160_000) for encoder in encoders.values()] == [415, 500, 496]
    assert encoders["moonshine"].frame_rate == pytest.approx(41.6667, abs=1e-3)
    assert encoders["whisper"].frame_rate == encoders["beats"].frame_rate == 50.0
    assert (pooled.output_length(160_001), pooled.frame_rate) == (125, 12.5)
    assert window.output_length(1) == window.output_length(10**7) == 1500
    assert encoders["whisper"].output_length(10**7) == 1500


def test_published_sizes_on_the_meta_device() -> None:
    large = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    expected = [
        (EncoderSpec(kind="beats"), 90_717_055),
        (EncoderSpec(kind="moonshine"), 7_681_248),
        (EncoderSpec(kind="whisper", config=large), 636_784_640),
    ]
    with torch.device("meta"):
        for spec, count in expected:
            encoder = build_encoder(spec)
            assert sum(parameter.numel() for parameter in encoder.parameters()) == count
            assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
            assert not encoder.training


def test_random_weights_come_from_the_seed_and_leave_other_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("moonshine", "whisper", "beats"):
        spec = SPECS[name]
        digests = [build_encoder(spec.model_copy(update={"seed": s})).describe()["weights"] for s in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_descriptions_are_plain_and_differ() -> None:
    described = [build_encoder(spec).describe() for spec in SPECS.values()]
    assert len({json.dumps(entry, sort_keys=True) for entry in described}) == len(SPECS)
    assert described[0]["preprocessing"] == {
        "input": "waveform",
        "sample_rate": 16000,
        "shortest": 895,
        "group_norm": "valid frames",
    }


def test_wrong_specs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown encoder 'ears'; known are beats, .*moonshine, .*whisper"):
        build_encoder(EncoderSpec(kind="ears"))
    for kind, config in (("moonshine", MOONSHINE), ("whisper", WHISPER), ("beats", BEATS)):
        with pytest.raises(ValueError, match="between 1 and 2"):
            build_encoder(EncoderSpec(kind=kind, config=config, layer=3))
    with pytest.raises(ValueError, match="layer_norm_first=True"):
        build_encoder(EncoderSpec(kind="beats", config=BEATS | {"layer_norm_first": True}))


# ---- against transformers ---------------------------------------------------------------------------------------


def test_moonshine_equals_transformers() -> None:
    encoder = build_encoder(SPECS["moonshine"])
    clip = clips(20000)[0]
    with torch.inference_mode():
        theirs = encoder.layers(clip[None], output_hidden_states=True)
        assert (encoder([clip])[0] - theirs.last_hidden_state[0]).abs().max() < 1e-5
        first = build_encoder(EncoderSpec(kind="moonshine", config=MOONSHINE, layer=1))
        assert (first([clip])[0] - theirs.hidden_states[1][0]).abs().max() < 1e-5


def test_whisper_with_its_window_equals_transformers() -> None:
    encoder = build_encoder(EncoderSpec(kind="whisper", config=WHISPER, window=True))
    short, long = clips(9000, 50000)
    padded = torch.nn.functional.pad(short, (0, encoder.longest - 9000))
    with torch.inference_mode():
        mine = encoder([short, long])
        theirs = encoder.layers(log_mel(torch.stack([padded, long[: encoder.longest]]))).last_hidden_state
    assert (torch.stack(mine) - theirs).abs().max() < 1e-5


def test_log_mel_equals_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    clip = clips(16000)[0]
    extractor = WhisperFeatureExtractor(feature_size=128)
    theirs = extractor(clip.numpy(), sampling_rate=16000, padding="longest", return_tensors="pt")
    assert torch.equal(log_mel(clip, 128), theirs["input_features"][0])
    loud = extractor(clip.numpy(), sampling_rate=16000, padding="longest", do_normalize=True, return_tensors="pt")
    assert (log_mel(normalise(clip), 128) - loud["input_features"][0]).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_kaldi_fbank_equals_transformers() -> None:
    clip = clips(8123)[0] * 2**15
    theirs, filters = kaldi_by_transformers(clip, "povey")
    assert np.abs(filters.T - kaldi_filters(128, torch.device("cpu")).numpy()).max() < 1e-6
    mine = kaldi_fbank(clip).numpy()
    assert mine.shape == theirs.shape == (kaldi_frames(8123), 128) == (49, 128)
    assert np.abs(mine - theirs).max() < 0.02  # float32 against float64, in the quietest cells
    assert np.abs(mine - theirs).mean() < 1e-4


def test_beats_attention_equals_the_gated_attention_of_wavlm() -> None:
    """WavLM's gate reads the input where BEATs reads the query: with the identity as query layer they are the same."""
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    torch.manual_seed(0)
    config = BeatsConfig.of(BEATS | {"num_buckets": 16, "max_distance": 20})
    mine = Attention(config, torch.nn.Embedding(16, 4))
    theirs = WavLMAttention(32, 4, num_buckets=16, max_distance=20).eval()
    with torch.no_grad():
        mine.q_proj.weight.copy_(torch.eye(32))
        mine.q_proj.bias.zero_()
        mine.grep_a.uniform_(0.5, 2.0)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(theirs, name).load_state_dict(getattr(mine, name).state_dict())
        theirs.gru_rel_pos_linear.load_state_dict(mine.grep_linear.state_dict())
        theirs.gru_rel_pos_const.copy_(mine.grep_a)
        theirs.rel_attn_embed.load_state_dict(mine.relative_attention_bias.state_dict())
        tokens = torch.randn(2, 40, 32)
        position = mine.position_bias(40)
        expected, _, their_position = theirs(tokens, position_bias=theirs.compute_bias(40, 40).repeat(2, 1, 1))
        got = mine(tokens, position, torch.zeros(2, 1, 1, 40, dtype=torch.bool))
    assert torch.equal(position[0], theirs.compute_bias(40, 40))
    assert their_position is not None
    assert (got - expected).abs().max() < 1e-5


# ---- weights from files -----------------------------------------------------------------------------------------


def test_beats_reads_a_public_checkpoint(tmp_path: Path) -> None:
    source = build_encoder(SPECS["beats"].model_copy(update={"seed": 5}))
    names = set(source.layers.state_dict())
    shared = "self_attn.relative_attention_bias.weight"
    assert {"patch_embedding.weight", "post_extract_proj.bias", "layer_norm.weight", "encoder.layer_norm.bias"} <= names
    assert {"encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v", "encoder.pos_conv.0.bias"} <= names
    assert {f"encoder.layers.1.{shared}", "encoder.layers.0.self_attn.grep_a", "encoder.layers.0.fc1.bias"} <= names
    path = tmp_path / "beats.pt"
    sizes = {name: value for name, value in BEATS.items() if name != "finetuned_model"}
    torch.save({"cfg": sizes | {"dropout": 0.1, "deep_norm": True}, "model": source.layers.state_dict()}, path)
    read = build_encoder(EncoderSpec(kind="beats", weights=str(path)))
    filled = BeatsEncoder(SPECS["beats"])
    filled.load_checkpoint(path)
    clip = clips(6000)
    with torch.inference_mode():
        assert torch.equal(read(clip)[0], source(clip)[0])
        assert torch.equal(filled(clip)[0], source(clip)[0])


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "beats.pt"
    with pytest.raises(FileNotFoundError, match=r"beats\.pt; download"):
        build_encoder(EncoderSpec(kind="beats", weights=str(path)))
    torch.save({"cfg": {}, "model": {}, "extra": Path("x")}, path)
    with pytest.raises(ValueError, match=r"beats\.pt is no BEATs checkpoint"):
        build_encoder(EncoderSpec(kind="beats", weights=str(path)))
    torch.save({"cfg": BEATS, "model": {"layer_norm.weight": torch.ones(16)}}, path)
    with pytest.raises(ValueError, match=r"beats\.pt does not fit the encoder"):
        build_encoder(EncoderSpec(kind="beats", weights=str(path)))


def test_encoders_are_read_from_folders_of_whole_models(tmp_path: Path) -> None:
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration, WhisperConfig
    from transformers import WhisperForConditionalGeneration as Whisper

    decoder = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 8, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = Whisper(WhisperConfig(**WHISPER, **decoder, **ids)).eval()
    whisper.save_pretrained(tmp_path / "whisper")
    (tmp_path / "whisper" / "preprocessor_config.json").write_text('{"do_normalize": true}')
    moonshine = MoonshineForConditionalGeneration(MoonshineConfig(**MOONSHINE, **ids)).eval()
    moonshine.save_pretrained(tmp_path / "moonshine")
    clip = clips(32000)[0]
    with torch.inference_mode():
        read = build_encoder(EncoderSpec(kind="moonshine", weights=str(tmp_path / "moonshine")))
        assert (read([clip])[0] - moonshine.model.encoder(clip[None]).last_hidden_state[0]).abs().max() < 1e-5
        read = build_encoder(EncoderSpec(kind="whisper", weights=str(tmp_path / "whisper")))
        theirs = whisper.model.encoder(log_mel(normalise(clip))[None]).last_hidden_state[0]
        assert (read([clip])[0] - theirs).abs().max() < 1e-5
        spec = EncoderSpec(kind="whisper", weights=str(tmp_path / "whisper"), config={"max_source_positions": 50})
        assert build_encoder(spec)([clip])[0].shape == (50, 32)
    (tmp_path / "moonshine" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        build_encoder(EncoderSpec(kind="moonshine", weights=str(tmp_path / "moonshine")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reference"), [("moonshine", "earloom/moonshine-tiny-en"), ("whisper", "earloom/whisper-tiny-smart-turn")]
)
def test_real_encoders_batch_real_speech(kind: str, reference: str, shared_data: Path) -> None:
    import soundfile

    try:
        encoder = build_encoder(EncoderSpec(kind=kind, weights=reference))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = shared_data / "librispeech_mini"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][2:5]
    speech = [torch.from_numpy(soundfile.read(folder / row["audio"], dtype="float32")[0]) for row in rows]
    with torch.inference_mode():
        together = encoder(speech)
        alone = [encoder([clip])[0] for clip in speech]
    # Of the largest value: which kernels run depends on the processor. A cache rounds to 1/256.
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, alone, strict=True)) < 1e-4
    assert [len(frames) for frames in together] == [encoder.output_length(len(clip)) for clip in speech]
