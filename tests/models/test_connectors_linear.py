"""Pooling, stacking and convolutions against the same done by hand, clip by clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.connectors.conv_bottleneck import ConvBottleneck
from models.connectors.linear import LinearProjector
from models.connectors.stacking import StackMLP


@pytest.mark.parametrize(
    ("pool", "drop", "frames", "tokens"),
    [(2, True, 64, 32), (2, True, 1500, 750), (2, True, 7, 3), (2, False, 7, 4), (3, True, 2, 1), (1, True, 5, 5)],
)
def test_tokens_after_pooling(pool: int, drop: bool, frames: int, tokens: int) -> None:
    assert LinearProjector(4, 4, pool=pool, drop_remainder=drop).tokens(frames) == tokens


@pytest.mark.parametrize("frames", [2, 3, 50, 1499, 1500])
def test_pooling_by_two_gives_the_span_of_qwen_audio(frames: int) -> None:
    assert LinearProjector(4, 4, pool=2, norm="affine").tokens(frames) == (frames - 2) // 2 + 1


@torch.no_grad()
def test_qwen_audio_pools_then_normalises_then_projects() -> None:
    connector = LinearProjector(8, 5, pool=2, norm="affine")
    norm, proj = connector.norm, connector.proj
    assert isinstance(norm, nn.LayerNorm)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    frames = torch.randn(2, 9, 8)
    pooled = functional.avg_pool1d(frames.transpose(1, 2), 2, stride=2).transpose(1, 2)
    expected = functional.linear(functional.layer_norm(pooled, (8,), norm.weight, norm.bias), proj.weight, proj.bias)
    tokens, counts = connector(frames, torch.tensor([9, 9]))
    assert counts.tolist() == [4, 4]
    assert torch.allclose(tokens, expected, atol=1e-6)


@torch.no_grad()
def test_the_remainder_is_the_mean_of_what_is_there() -> None:
    connector = LinearProjector(3, 3, pool=4, drop_remainder=False)
    frames = torch.randn(1, 12, 3)
    tokens, counts = connector(frames, torch.tensor([6]))
    assert counts.tolist() == [2]
    assert torch.allclose(tokens[0, 1], connector.proj(frames[0, 4:6].mean(0)), atol=1e-6)


@torch.no_grad()
def test_ltus_division_by_fifty_is_an_eps_of_the_norm() -> None:
    torch.manual_seed(0)
    connector = LinearProjector(768, 16, pool=2, norm="plain", eps=2500 * 1e-5)
    frames = 0.3 * torch.randn(1, 64, 768)
    pooled = frames.view(1, 32, 2, 768).mean(2)
    expected = connector.proj(functional.layer_norm(pooled / 50, (768,)))
    tokens, _ = connector(frames, torch.tensor([64]))
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert not torch.allclose(tokens, connector.proj(functional.layer_norm(pooled, (768,))), atol=1e-3)


def test_an_unknown_norm_is_refused() -> None:
    norm: Any = "layer"
    with pytest.raises(ValueError, match="none, plain, affine"):
        LinearProjector(4, 4, norm=norm)


@torch.no_grad()
def test_seed_asr_pads_the_last_group_with_zeros() -> None:
    connector = StackMLP(3, stack=4, hidden=None, out=5, drop_remainder=False)
    frames = torch.randn(2, 8, 3)
    tokens, counts = connector(frames, torch.tensor([8, 6]))
    assert counts.tolist() == [2, 2]
    assert [name for name, _ in connector.named_parameters()] == ["linear1.weight", "linear1.bias"]
    last = torch.cat([frames[1, 4:6].flatten(), torch.zeros(6)])
    assert torch.allclose(tokens[1, 1], connector.linear1.weight @ last + connector.linear1.bias, atol=1e-6)


@torch.no_grad()
def test_a_branch_of_wavllm_is_what_its_parts_say() -> None:
    torch.manual_seed(0)
    branch = ConvBottleneck(6, 8, out=7, channels=4, bottleneck=3, layers=2)
    assert branch.output_weights is not None
    branch.output_weights.copy_(torch.tensor([0.3, -1.2]))
    frames = torch.randn(1, 11, 12)
    weights = branch.output_weights.softmax(0)
    x = weights[0] * frames[..., :6] + weights[1] * frames[..., 6:]
    for conv in branch.subsample.conv_layers:
        assert isinstance(conv, nn.Conv1d)
        wide = functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, stride=2, padding=1).transpose(1, 2)
        half = wide.shape[-1] // 2
        x = wide[..., :half] * wide[..., half:].sigmoid()
    adapter = branch.adapter
    inner = adapter.up_layer(functional.gelu(adapter.down_layer(x)))
    expected = branch.projector(functional.layer_norm(inner, (4,)) + x)
    tokens, counts = branch(frames, torch.tensor([11]))
    assert counts.tolist() == [3] == [branch.tokens(11)]
    assert torch.allclose(tokens, expected, atol=1e-5)


@pytest.mark.parametrize(("frames", "tokens"), [(1500, 375), (1499, 375), (1497, 375), (1496, 374), (4, 1), (5, 2)])
def test_wavllms_convolutions_give_a_token_every_80_ms(frames: int, tokens: int) -> None:
    assert ConvBottleneck(6, 8, out=7, channels=4, bottleneck=3).tokens(frames) == tokens
