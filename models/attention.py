"""Attention over a packed row without its full square: each sample attends to itself alone.

transformers' sdpa needs a dense block-diagonal mask for packed rows and computes the whole square. Here the borders of
the samples go along instead: on CUDA to PyTorch's variable-length kernel (flash attention), elsewhere to one call
of sdpa a sample. Rows without borders (padded ones, generation) take transformers' own sdpa path.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "segments"  # the attention implementation under which backbones are loaded
HALF = (torch.float16, torch.bfloat16)
SHORT = 256  # tokens: up to here plain products are faster on CPU than the blocked kernel, backward most of all


def borders(segments: Tensor) -> tuple[Tensor, int]:
    """Where the samples of a packed row begin and end, `(samples + 1,)` int32, and the longest, from `(1, length)`."""
    counts = torch.unique_consecutive(segments[0], return_counts=True)[1]
    ends = nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return ends, int(counts.max())


def packed_arguments(segments: Tensor) -> dict[str, Any]:
    """What a backbone's decoder is called with for a packed row.

    The mask of one element is never used: a mask of four dimensions keeps transformers from building a dense one.
    """
    ends, longest = borders(segments)
    unused = torch.zeros(1, 1, 1, 1, device=segments.device)
    return {
        "attention_mask": unused,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def segments_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, `(rows, heads, length, width)` → `(rows, length, heads, width)`.

    Raises RuntimeError if a backbone loses the borders of a packed row on the way: attention over all of it would be
    silently wrong.
    """
    ends = kwargs.get("cu_seq_lens_q")
    if ends is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) != (query.shape[2], key.shape[2]):
            raise RuntimeError(
                f"{type(module).__name__} does not pass on the borders of packed rows: use layout=bucketed"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)  # type: ignore[no-any-return]
    if query.is_cuda and query.dtype in HALF and not dropout:
        return _varlen(query, key, value, ends, kwargs["max_length_q"], scaling), None
    return _one_by_one(query, key, value, ends, kwargs["max_length_q"], dropout, scaling), None


@torch.compiler.disable  # else a compiled layer would be compiled again for each number of samples in a row
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, dropout: float, scaling: float | None
) -> Tensor:
    plain = sdpa_kernel(SDPBackend.MATH) if query.device.type == "cpu" and longest <= SHORT else nullcontext()
    with plain:
        parts = [
            nn.functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                dropout_p=dropout,
                is_causal=True,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            for start, end in pairwise(ends.tolist())
        ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    flat_query, flat_key, flat_value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    made = varlen_attn(
        flat_query,  # (length, heads, width)
        flat_key,
        flat_value,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(made, Tensor)
    return made[None]


AttentionInterface.register(NAME, segments_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
