"""Connectors that work inside the backbone: gated cross-attention and the zero-initialised adapter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.connectors.gated_cross_attention import GatedCrossAttention
from models.connectors.zero_adapter import SwiGLU, ZeroAdapter


@pytest.fixture
def block() -> GatedCrossAttention:
    torch.manual_seed(0)
    made = GatedCrossAttention(12, media_width=10, heads=2, head_width=4)
    with torch.no_grad():
        made.attn_gate.fill_(0.7)
        made.ff_gate.fill_(-0.4)
    return made


def reference(block: GatedCrossAttention, token: Tensor, media: Tensor) -> Tensor:
    """One token, `(width,)`, and the media it sees, `(media, width)`, head by head."""
    attn = block.attn
    query = attn.to_q(attn.norm(token)).view(2, 4)
    keys, values = (part.view(len(media), 2, 4) for part in attn.to_kv(media).split(8, dim=-1))
    heads = []
    for head in range(2):
        weights = torch.stack([query[head] @ key / math.sqrt(4) for key in keys[:, head]]).softmax(0)
        heads.append((weights[:, None] * values[:, head]).sum(0))
    token = token + math.tanh(0.7) * attn.to_out(torch.cat(heads))
    inner = functional.gelu(block.ff[1](functional.layer_norm(token, (12,))))
    return token + math.tanh(-0.4) * block.ff[3](inner)  # type: ignore[no-any-return]


@torch.no_grad()
def test_each_token_reads_the_media_it_may_see(block: GatedCrossAttention) -> None:
    hidden, media = torch.randn(2, 5, 12), torch.randn(2, 3, 10)
    visible = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool().expand(2, 5, 3)
    out = block(hidden, media, visible)
    for row in range(2):
        for at in range(5):
            expected = reference(block, hidden[row, at], media[row, visible[row, at]])
            assert torch.allclose(out[row, at], expected, atol=1e-5)


def test_closed_gates_leave_the_language_model_as_it_was() -> None:
    block = GatedCrossAttention(12, media_width=10, heads=2, head_width=4)
    hidden = torch.randn(2, 5, 12)
    assert torch.equal(block(hidden, torch.randn(2, 3, 10), torch.ones(2, 5, 3).bool()), hidden)


def test_who_sees_no_media_passes_unchanged_and_without_nan(block: GatedCrossAttention) -> None:
    hidden = torch.randn(2, 4, 12, requires_grad=True)
    media = torch.full((2, 3, 10), float("nan"))
    media[0, 0] = torch.randn(10)
    media.requires_grad_()
    visible = torch.zeros(2, 4, 3).bool()
    visible[0, 2:, 0] = True
    out = block(hidden, media, visible)
    assert torch.equal(out[1], hidden[1])
    assert torch.equal(out[0, :2], hidden[0, :2])
    assert not torch.isclose(out[0, 2:], hidden[0, 2:]).all(-1).any()
    out.square().sum().backward()
    for name, value in [("hidden", hidden), ("media", media), *block.named_parameters()]:
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
    assert torch.equal(hidden.grad[1], 2 * hidden[1])  # type: ignore[index]


def test_a_batch_without_media_passes_unchanged(block: GatedCrossAttention) -> None:
    hidden = torch.randn(2, 4, 12)
    assert torch.equal(block(hidden, torch.empty(2, 0, 10), torch.empty(2, 4, 0).bool()), hidden)


@pytest.fixture
def adapter() -> ZeroAdapter:
    torch.manual_seed(0)
    return ZeroAdapter(encoder_layers=3, width=6, out=16, layers=5, heads=4, adapted=3, blocks=2)


@torch.no_grad()
def test_one_vector_from_the_mean_over_time_and_the_weighted_layers(adapter: ZeroAdapter) -> None:
    frames = torch.randn(2, 7, 18)
    vectors, counts = adapter(frames, torch.tensor([7, 4]))
    assert vectors.shape == (2, 1, 16)
    assert counts.tolist() == [1, 1]
    mean = frames[1, :4].mean(0).view(3, 6)
    mixed = adapter.agg.weight[0, :, 0] @ mean + adapter.agg.bias  # type: ignore[operator]
    vector = adapter.proj(mixed / mixed.norm())
    for block in adapter.blocks:
        assert isinstance(block, SwiGLU)
        normed = vector / (vector.square().mean() + 1e-6).sqrt()
        vector = vector + block.w2(functional.silu(block.w1(normed)) * block.w3(normed))
    assert torch.allclose(vectors[1, 0], vector, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_the_injection_is_gate_times_value_of_query_plus_vector(adapter: ZeroAdapter, key_value_heads: int) -> None:
    v_proj = nn.Linear(16, 4 * key_value_heads, bias=False)
    vector = torch.randn(3, 16)
    assert torch.count_nonzero(adapter.injection(4, vector, v_proj)) == 0  # gates start at zero
    adapter.gate.normal_()
    injected = adapter.injection(4, vector, v_proj)
    assert injected.shape == (3, 1, 16)
    value = v_proj(adapter.prefix_query.weight[2] + vector)
    for head in range(4):
        group = head // (4 // key_value_heads)
        expected = adapter.gate[4, head].tanh() * value[:, 4 * group : 4 * group + 4]
        assert torch.allclose(injected[:, 0, 4 * head : 4 * head + 4], expected, atol=1e-6)


def test_only_the_last_layers_are_adapted(adapter: ZeroAdapter) -> None:
    v_proj, vector = nn.Linear(16, 16), torch.randn(1, 16)
    assert adapter.injection(2, vector, v_proj).shape == (1, 1, 16)
    for layer in (1, 5):
        with pytest.raises(ValueError, match="layers 2 to 4 are adapted"):
            adapter.injection(layer, vector, v_proj)


def test_a_gate_learns_though_it_starts_at_zero(adapter: ZeroAdapter) -> None:
    vectors, _ = adapter(torch.randn(2, 4, 18), torch.tensor([4, 3]))
    adapter.injection(3, vectors[:, 0], nn.Linear(16, 16)).sum().backward()
    assert adapter.gate.grad is not None
    assert adapter.gate.grad.any(1).tolist() == [False, False, False, True, False]


@torch.no_grad()
def test_a_head_need_not_be_the_width_over_the_heads() -> None:
    adapter = ZeroAdapter(2, 4, 8, layers=2, heads=3, adapted=1, blocks=1, head_width=5)
    adapter.gate.fill_(20.0)
    v_proj = nn.Linear(8, 5)
    injected = adapter.injection(1, torch.randn(2, 8), v_proj)
    assert injected.shape == (2, 1, 15)
    assert torch.equal(injected[..., :5], injected[..., 10:])
