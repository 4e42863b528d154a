"""Parameter counts at the published sizes, on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.connectors.conv_bottleneck import ConvBottleneck, JoinedBranches
from models.connectors.gated_cross_attention import AudioTransformer, GatedCrossAttention
from models.connectors.linear import LinearProjector
from models.connectors.prefix_mapper import TransformerMapper
from models.connectors.stacking import StackMLP
from models.connectors.tltr import TLTR
from models.connectors.transformer import TransformerAdapter
from models.connectors.window_qformer import WindowQFormer
from models.connectors.zero_adapter import ZeroAdapter

LORA_R32_QKVO_7B = 32 * 4 * 32 * (4096 + 4096)


def wavllm(audio_proj: bool) -> JoinedBranches:
    return JoinedBranches(ConvBottleneck(1280, 1280), ConvBottleneck(768, 512, layers=13), 4096, audio_proj)


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LTU": (lambda: LinearProjector(768, 4096, pool=2, norm="plain"), 3_149_824),
    "LTU-AS": (lambda: TLTR(32, 1280, 4096), 39_352_320 + 5_246_976),
    "Qwen-Audio, ln_post and proj": (lambda: LinearProjector(1280, 4096, pool=2, norm="affine"), 5_246_976 + 2560),
    "LLaSM": (lambda: LinearProjector(1280, 4096), 5_246_976),
    "FunASR": (lambda: StackMLP(1280, 5, 2048, 4096), 6401 * 2048 + 2049 * 4096),
    "SALMONN": (
        lambda: WindowQFormer((1280, 768), 17, 1, 2, 768, 12, 5120),
        22_835_712 + 1_536 + 768 + 3_937_280 + 4_096,
    ),
    "WavLLM with the unused projection, less LoRA": (lambda: wavllm(True), 76_636_941 - LORA_R32_QKVO_7B),
    "WavLLM": (lambda: wavllm(False), 76_636_941 - LORA_R32_QKVO_7B - (2048 * 4096 + 4096)),
    "Pengi, one mapper": (
        lambda: TransformerMapper(1024, 768, 40),
        1025 * 40 * 768 + 40 * 768 + 4 * (768 * 768 * 8 + 768 * 8),  # widths 4 + 4; biases and norms 1 + 2 + 1 + 4
    ),
    "Audio Flamingo, cross-attention": (GatedCrossAttention, 36_708_354),
    "Audio Flamingo, transformer": (AudioTransformer, 25_189_376),
    "SLM, five layers of 1536": (
        lambda: TransformerAdapter(1536, 5, 12, 6144, 4096, stride=4),
        5 * 28_329_984 + 2 * 1536 + 1537 * 4096,
    ),
}


@pytest.mark.parametrize("system", PUBLISHED)
def test_a_connector_of_published_size_has_the_published_parameters(system: str) -> None:
    build, expected = PUBLISHED[system]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == expected


def test_the_parts_of_ltu_as_have_their_counts_and_names() -> None:
    with torch.device("meta"):
        connector = TLTR(32, 1280, 4096)
    proj = sum(p.numel() for p in connector.audio_proj.parameters())
    assert proj == 5_246_976
    assert sum(p.numel() for p in connector.parameters()) - proj == 39_352_320
    block = {f"attn.{part}.weight" for part in ("query", "key", "value", "out")} | {"attn.query.bias"}
    block |= {"attn.value.bias", "attn.out.bias"}
    block |= {f"{part}.{kind}" for part in ("attn_ln", "mlp.0", "mlp.2", "mlp_ln") for kind in ("weight", "bias")}
    assert set(connector.time_tr.state_dict()) == set(connector.layer_tr.state_dict()) == block


def test_counts_that_are_published_in_millions() -> None:
    with torch.device("meta"):
        cosmic = WindowQFormer((1280,), 17, 1, 2, 768, 12, 4096)
        mu_llama = ZeroAdapter()
        slm = TransformerAdapter(1536, 5, 12, 6144, 4096, stride=4)
    assert sum(p.numel() for p in cosmic.parameters()) / 1e6 == pytest.approx(23.6, abs=0.05)
    assert sum(p.numel() for p in mu_llama.parameters()) / 1e6 == pytest.approx(608.3, abs=0.05)
    assert sum(p.numel() for p in slm.parameters()) / 1e6 == pytest.approx(156, rel=0.06)


def test_names_are_those_of_the_checkpoints() -> None:
    with torch.device("meta"):
        transformer = AudioTransformer().state_dict()
        gated = GatedCrossAttention().state_dict()
        mapper = TransformerMapper(1024, 768, 40).state_dict()
        branches = wavllm(True).state_dict()
    layer = [f"slf_attn.{part}.weight" for part in ("w_qs", "w_ks", "w_vs", "fc", "layer_norm")]
    layer += ["slf_attn.layer_norm.bias", "pos_ffn.w_1.bias", "pos_ffn.w_2.weight", "pos_ffn.layer_norm.weight"]
    assert {f"layer_stack.{n}.{part}" for n in range(3) for part in layer} <= set(transformer)
    assert transformer["position_enc.pos_table"].shape == (1, 128, 1024)
    parts = {"attn.norm.weight", "attn.norm.bias", "attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight"}
    parts |= {"attn_gate", "ff_gate", "ff.0.weight", "ff.0.bias", "ff.1.weight", "ff.3.weight"}
    assert set(gated) == parts
    assert {"linear.weight", "linear.bias", "prefix_const"} <= set(mapper)
    layer = ["norm1.bias", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "attn.project.bias"]
    layer += ["attn.to_queries.weight", "attn.to_keys_values.weight"]
    assert {f"transformer.layers.{n}.{part}" for n in range(4) for part in layer} <= set(mapper)
    parts = {f"audio_encoder.{part}.weight" for part in ("subsample.conv_layers.0", "subsample.conv_layers.1")}
    parts |= {"wavlm_encoder.output_weights", "wavlm_encoder.projector.bias", "wavlm_encoder.adapter.layer_norm.bias"}
    assert parts | {"wavlm_audio_proj.weight", "audio_proj.weight"} <= set(branches)
