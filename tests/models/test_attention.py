"""Packed rows: every sample is computed as if it were alone, on every kind of backbone, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from models import attention

LENGTHS = [5, 9, 3, 140]  # the last is longer than attention.SHORT, where the other kernel is used
WIDTH = 48
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 64},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 12},
    "opt": {"word_embed_proj_dim": WIDTH, "ffn_dim": 64},
    "gpt2": {},
}


def decoder(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES[kind],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    return model.get_decoder()


def packed_row() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The samples alone; and in one row: embeddings, positions, segments."""
    generator = torch.Generator().manual_seed(1)
    alone = [torch.randn(1, length, WIDTH, generator=generator) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    segments = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(LENGTHS)])[None]
    return alone, torch.cat(alone, dim=1), positions, segments


@pytest.mark.parametrize("kind", SIZES)
def test_packed_is_alone(kind: str) -> None:
    model = decoder(kind)
    alone, row, positions, segments = packed_row()
    expected = torch.cat([model(inputs_embeds=x, use_cache=False).last_hidden_state for x in alone], dim=1)
    arguments = attention.packed_arguments(segments)
    found = model(inputs_embeds=row, position_ids=positions, use_cache=False, **arguments).last_hidden_state
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", SIZES)
def test_padded_is_alone(kind: str) -> None:
    model = decoder(kind)
    alone, *_ = packed_row()
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), WIDTH)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for i, sample in enumerate(alone):
        rows[i, : sample.shape[1]], mask[i, : sample.shape[1]] = sample[0], 1
    found = model(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
    for i, sample in enumerate(alone):
        expected = model(inputs_embeds=sample, use_cache=False).last_hidden_state[0]
        assert float((found[i, : len(expected)] - expected).abs().max()) < 1e-5


def test_recomputed_activations_keep_the_borders() -> None:
    """Checkpointing runs the forward pass again inside backward: it must see the same samples."""
    _, row, positions, segments = packed_row()
    gradients = []
    for recompute in (False, True):
        model = decoder("llama").train()
        if recompute:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        inputs = row.clone().requires_grad_()
        arguments = attention.packed_arguments(segments)
        out = model(inputs_embeds=inputs, position_ids=positions, use_cache=False, **arguments).last_hidden_state
        out.square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_a_backbone_that_loses_the_borders_is_refused() -> None:
    query = torch.randn(1, 2, 6, 8)
    unused = attention.packed_arguments(torch.ones(1, 6))["attention_mask"]
    with pytest.raises(RuntimeError, match="does not pass on the borders of packed rows"):
        attention.segments_attention(torch.nn.Identity(), query, query, query, unused)


def test_borders_of_segments() -> None:
    ends, longest = attention.borders(torch.tensor([[1, 1, 1, 2, 3, 3]]))
    assert ends.tolist() == [0, 3, 4, 6]
    assert longest == 3
