"""The transformer connectors against transformers' and PyTorch's own layers with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from models.connectors.blocks import ResidualBlock
from models.connectors.gated_cross_attention import AudioTransformer, PostNormLayer
from models.connectors.prefix_mapper import Layer, TransformerMapper
from models.connectors.tltr import TLTR
from models.connectors.transformer import TransformerAdapter

WHISPER = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def whisper_layer(block: ResidualBlock, width: int, heads: int) -> WhisperEncoderLayer:
    """The encoder layer of transformers with the weights of a block."""
    config = WhisperConfig(d_model=width, encoder_attention_heads=heads, encoder_ffn_dim=4 * width)
    config._attn_implementation = "eager"
    layer = WhisperEncoderLayer(config).eval()
    state = {}
    for name, value in block.state_dict().items():
        part, _, kind = name.rpartition(".")
        state[f"{WHISPER[part]}.{kind}"] = value
    layer.load_state_dict(state)
    return layer


def run(layer: WhisperEncoderLayer, hidden: Tensor) -> Tensor:
    out = layer(hidden, attention_mask=None)
    return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def test_tltr_is_whispers_block_over_time_for_each_layer_and_then_over_layers_for_each_moment() -> None:
    torch.manual_seed(0)
    connector = randomised(TLTR(layers=5, width=16, out=6, time_heads=1, layer_heads=4))
    assert isinstance(connector, TLTR)
    in_time, over_layers = whisper_layer(connector.time_tr, 16, 1), whisper_layer(connector.layer_tr, 16, 4)
    clip = torch.randn(7, 5, 16)  # frames, layers, width
    timed = torch.stack([run(in_time, clip[None, :, layer])[0] for layer in range(5)], dim=1)
    read = torch.stack([run(over_layers, timed[None, at])[0].mean(0) for at in range(7)])
    expected = connector.audio_proj.proj(nn.functional.layer_norm(read, (16,)))
    tokens, counts = connector(clip.flatten(1)[None], torch.tensor([7]))
    assert counts.tolist() == [7]
    assert torch.allclose(tokens[0], expected, atol=1e-4)


def torch_layer(block: ResidualBlock, width: int, heads: int, ffn: int) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        width, heads, ffn, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    attention = block.attn
    layer.self_attn.in_proj_weight.copy_(
        torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
    )
    layer.self_attn.in_proj_bias.copy_(torch.cat([attention.query.bias, torch.zeros(width), attention.value.bias]))
    for ours, theirs in (
        (attention.out, layer.self_attn.out_proj),
        (block.attn_ln, layer.norm1),
        (block.mlp[0], layer.linear1),
        (block.mlp[2], layer.linear2),
        (block.mlp_ln, layer.norm2),
    ):
        theirs.load_state_dict(ours.state_dict())
    return layer


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_the_adapter_is_pytorchs_pre_norm_encoder(causal: bool) -> None:
    torch.manual_seed(0)
    adapter = randomised(TransformerAdapter(6, 3, 4, 24, 16, hidden=16, stride=2, causal=causal))
    assert isinstance(adapter, TransformerAdapter)
    frames, lengths = torch.randn(2, 13, 6), torch.tensor([13, 8])
    hidden = adapter.linear_in(frames[:, ::2])
    padding = torch.arange(7)[None] >= torch.tensor([7, 4])[:, None]
    future = torch.ones(7, 7).triu(1).bool() if causal else None
    for block in adapter.layers:
        assert isinstance(block, ResidualBlock)
        hidden = torch_layer(block, 16, 4, 24)(hidden, src_mask=future, src_key_padding_mask=padding)
    expected = adapter.norm(hidden)
    tokens, counts = adapter(frames, lengths)
    assert counts.tolist() == [7, 4]
    assert torch.allclose(tokens[0], expected[0], atol=1e-4)
    assert torch.allclose(tokens[1, :4], expected[1, :4], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_adapter_does_not_look_ahead_and_another_does(causal: bool) -> None:
    torch.manual_seed(0)
    adapter = TransformerAdapter(8, 2, 2, 16, 8, causal=causal).eval()
    frames, lengths = torch.randn(1, 6, 8), torch.tensor([6])
    before, _ = adapter(frames, lengths)
    frames[:, 4] = torch.randn(8)
    changed = (~torch.isclose(adapter(frames, lengths)[0], before, atol=1e-7)).any(-1)[0].tolist()
    assert changed == [not causal] * 4 + [True, True]


def test_linears_of_the_adapter_are_there_only_where_widths_differ() -> None:
    speech_llama = TransformerAdapter(6, 1, 2, 16, out=8, hidden=8)
    assert isinstance(speech_llama.linear_in, nn.Linear)
    assert isinstance(speech_llama.linear_out, nn.Identity)
    slm = TransformerAdapter(6, 1, 2, 16, out=8)
    assert isinstance(slm.linear_in, nn.Identity)
    assert isinstance(slm.linear_out, nn.Linear)
    assert isinstance(TransformerAdapter(6, 1, 2, 16, 8, norm=False).norm, nn.Identity)


@torch.no_grad()
def test_pengis_layers_are_pytorchs_pre_norm_relu_layers_and_the_last_of_the_prefix_is_kept() -> None:
    torch.manual_seed(0)
    mapper = randomised(TransformerMapper(10, 16, prefix=3, layers=2, heads=4))
    assert isinstance(mapper, TransformerMapper)
    assert mapper.linear is not None
    clip = torch.randn(2, 10)
    unit = clip / clip.norm(dim=-1, keepdim=True)
    hidden = torch.cat([mapper.linear(unit).view(2, 3, 16), mapper.prefix_const.expand(2, 3, 16)], dim=1)
    for ours in mapper.transformer.layers:
        assert isinstance(ours, Layer)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True).eval()
        layer.self_attn.in_proj_weight.copy_(torch.cat([ours.attn.to_queries.weight, ours.attn.to_keys_values.weight]))
        layer.self_attn.in_proj_bias.zero_()
        layer.self_attn.out_proj.load_state_dict(ours.attn.project.state_dict())
        layer.norm1.load_state_dict(ours.norm1.state_dict())
        layer.norm2.load_state_dict(ours.norm2.state_dict())
        layer.linear1.load_state_dict(ours.mlp.fc1.state_dict())
        layer.linear2.load_state_dict(ours.mlp.fc2.state_dict())
        hidden = layer(hidden)
    tokens, counts = mapper(clip[:, None] * 7.0, torch.tensor([1, 1]))  # the norm of the vector says nothing
    assert counts.tolist() == [3, 3] == [mapper.tokens(1)] * 2
    assert torch.allclose(tokens, hidden[:, 3:], atol=1e-4)


@torch.no_grad()
def test_the_sequence_mapper_reads_the_words_and_its_constants() -> None:
    torch.manual_seed(0)
    mapper = randomised(TransformerMapper(16, 16, prefix=3, layers=2, heads=4, sequence=True))
    assert isinstance(mapper, TransformerMapper)
    words = torch.randn(2, 5, 16)
    tokens, counts = mapper(words, torch.tensor([5, 2]))
    assert counts.tolist() == [3, 3]
    for row, count in enumerate((5, 2)):
        alone = mapper.transformer(torch.cat([words[row, :count], mapper.prefix_const])[None])
        assert torch.allclose(tokens[row], alone[0, count:], atol=1e-5)


def test_the_mapper_takes_one_vector_or_a_sequence_of_the_right_width() -> None:
    with pytest.raises(ValueError, match="one vector a clip, got 2"):
        TransformerMapper(4, 8, 3, layers=1, heads=2)(torch.randn(1, 2, 4), torch.tensor([2]))
    with pytest.raises(ValueError, match="width 4 must be 8"):
        TransformerMapper(4, 8, 3, layers=1, heads=2, sequence=True)
    assert TransformerMapper(8, 8, 3, layers=1, heads=2, sequence=True).linear is None


@torch.no_grad()
def test_audio_flamingos_transformer_is_pytorchs_post_norm_encoder_behind_sinusoids() -> None:
    torch.manual_seed(0)
    transformer = randomised(AudioTransformer(16, layers=2, heads=4, ffn=12, positions=9))
    assert isinstance(transformer, AudioTransformer)
    windows = torch.randn(2, 5, 16)
    table = torch.empty(5, 16)
    for at in range(5):
        for i in range(0, 16, 2):
            angle = torch.tensor(at / 10000 ** (i / 16))
            table[at, i], table[at, i + 1] = angle.sin(), angle.cos()
    hidden = transformer.layer_norm(windows * 4.0 + table)  # sqrt(16)
    for ours in transformer.layer_stack:
        assert isinstance(ours, PostNormLayer)
        layer = nn.TransformerEncoderLayer(16, 4, 12, 0.0, layer_norm_eps=1e-6, batch_first=True).eval()
        attention = ours.slf_attn
        layer.self_attn.in_proj_weight.copy_(
            torch.cat([attention.w_qs.weight, attention.w_ks.weight, attention.w_vs.weight])
        )
        layer.self_attn.in_proj_bias.zero_()
        layer.self_attn.out_proj.weight.copy_(attention.fc.weight)
        layer.self_attn.out_proj.bias.zero_()
        layer.norm1.load_state_dict(attention.layer_norm.state_dict())
        layer.linear1.load_state_dict(ours.pos_ffn.w_1.state_dict())
        layer.linear2.load_state_dict(ours.pos_ffn.w_2.state_dict())
        layer.norm2.load_state_dict(ours.pos_ffn.layer_norm.state_dict())
        hidden = layer(hidden)
    tokens, counts = transformer(windows, torch.tensor([5, 5]))
    assert counts.tolist() == [5, 5]
    assert torch.allclose(tokens, hidden, atol=1e-4)
    with pytest.raises(ValueError, match="10 windows, but positions for 9"):
        transformer(torch.randn(1, 10, 16), torch.tensor([10]))
