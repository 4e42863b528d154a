"""A gate that sets the strength of every LoRA channel by the request: WavLLM's prompt-aware LoRA weight adapter.

Source: arXiv 2404.00656, section 3.2; official code microsoft/SpeechT5, WavLLM/wavllm/models/llama.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from models.encoders.loading import valid_mask

STRONGEST = 3.0


class PromptGate(nn.Module):
    """How strong each channel of LoRA is, from the states of a request; names are the official ones.

    It starts at `plain` in all channels, whatever the request. Raises ValueError for a `plain` that it cannot give.
    """

    def __init__(self, width: int, hidden: int, plain: float) -> None:
        super().__init__()
        if not 0 < plain <= STRONGEST:
            raise ValueError(f"the gate gives at most {STRONGEST}: LoRA's alpha / rank must not be more; got {plain}")
        self.scale_fc_1 = nn.Linear(width, hidden)
        self.scale_fc_2 = nn.Linear(hidden, width)
        self.scale_weight_attention = nn.Linear(width, 1)
        nn.init.zeros_(self.scale_fc_2.weight)
        nn.init.constant_(self.scale_fc_2.bias, plain)

    @property
    def counts(self) -> bool:
        """Whether it learns, or has learnt, to give anything but its first value."""
        weight = self.scale_fc_2.weight
        return weight.requires_grad or bool(weight.any())

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """`(samples, length, width)`, `(samples,)` → `(samples, width)` between 0 and 3."""
        made = self.scale_fc_2(functional.gelu(self.scale_fc_1(states)))
        attention = self.scale_weight_attention(made).squeeze(-1).float()
        attention = attention.masked_fill(~valid_mask(lengths, made.shape[1]), -torch.inf).softmax(-1)
        return torch.einsum("sl,slw->sw", attention, made.float()).relu().clamp(max=STRONGEST)


class GatedLora:
    """Multiplies what the LoRA layers of a backbone add by the strength of the sample that each token belongs to.

    The strength takes the place of alpha / r (`plain`), which peft multiplies by afterwards. Projections narrower than
    the strength (keys and values of grouped-query attention) get the mean of neighbouring channels.
    """

    def __init__(self, llm: PreTrainedModel, plain: float) -> None:
        self.plain = plain
        self.strength: Tensor | None = None
        self.owners: Tensor | None = None
        self.bare = False
        for module in llm.modules():
            if isinstance(module, LoraLayer):
                module.lora_B["default"].register_forward_hook(self._multiply)

    def set(self, strength: Tensor | None, owners: Tensor | None = None) -> None:
        """For the runs that follow: `(samples, width)`, or None for alpha / r everywhere.

        Rows are samples in their order, several rows a sample (beams) next to each other; `owners` is for a packed row,
        the sample of each of its tokens, `(length,)`.
        """
        self.strength, self.owners = strength, owners

    @contextmanager
    def without(self) -> Iterator[None]:
        """The backbone alone."""
        self.bare = True
        try:
            yield
        finally:
            self.bare = False

    def _multiply(self, _: nn.Module, inputs: tuple[Tensor, ...], added: Tensor) -> Tensor:
        """`(rows, length, channels)` → the same."""
        if self.bare:
            return torch.zeros_like(added)
        if self.strength is None:
            return added
        strength = self.strength / self.plain
        if strength.shape[1] != added.shape[-1]:
            strength = functional.adaptive_avg_pool1d(strength[None], added.shape[-1])[0]
        if self.owners is not None:
            return added * strength[self.owners][None].to(added.dtype)
        rows = strength.repeat_interleave(len(added) // len(strength), 0)
        return added * rows[:, None].to(added.dtype)


@torch.no_grad()
def request_states(llm: PreTrainedModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """States of a causal backbone before its final norm, `(samples, length)`, `(samples,)` → `(…, length, width)`.

    No gradient goes into the backbone. What lies behind a request's end has no meaning.
    """
    decoder = llm.get_decoder()
    kept: list[Tensor] = []
    hook = decoder.norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        decoder(input_ids=ids, attention_mask=valid_mask(lengths, ids.shape[1]).long(), use_cache=False)
    finally:
        hook.remove()
    return kept[0]
