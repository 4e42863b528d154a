"""Backbones with an encoder of their own (T5 and its kin): the prompt goes into it, the answer out of the decoder.

A sample's sequence is prompt and answer in one, as for a causal backbone; here it is cut at its first label.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.batch import Batch, padded
from models.rendering import IGNORED


def hidden_states(llm: PreTrainedModel, embedded: Tensor, batch: Batch) -> Tensor:
    """Last decoder states, `(rows, length, width)`: each at the position before the token that it predicts, so that
    `Batch.targets` fits as it does for a causal backbone; zero elsewhere.

    Samples are run as padded rows whatever the layout of the batch, so they never see each other.
    """
    sources, targets = _parts(batch)
    states, mask = _encode(llm, embedded, sources)
    found = torch.zeros_like(embedded) + 0.0 * states.sum()  # a batch without labels has a gradient, of zero
    answered = [i for i, target in enumerate(targets) if len(target)]
    if not answered:
        return found
    start = torch.tensor([llm.config.decoder_start_token_id], device=batch.ids.device)
    inputs = [torch.cat([start, batch.ids[tuple(targets[i][:-1].T)]]) for i in answered]
    decoded = llm.get_decoder()(
        input_ids=padded(inputs),  # causal: what lies behind an answer's end is not seen by it
        encoder_hidden_states=states[answered],
        encoder_attention_mask=mask[answered],
        use_cache=False,
    ).last_hidden_state
    at = torch.cat([targets[i] for i in answered])
    valid = torch.cat([decoded[row, : len(targets[i])] for row, i in enumerate(answered)])
    return found.index_put((at[:, 0], at[:, 1] - 1), valid.to(found.dtype))


def _parts(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Places `(tokens, 2)` as row and column: each sample's prompt, and its answer."""
    learnt = batch.labels != IGNORED
    sources, targets = [], []
    for sample in range(1, batch.samples + 1):
        places = (batch.segments == sample).nonzero()
        labels = learnt[tuple(places.T)]
        first = int(labels.long().argmax()) if bool(labels.any()) else len(places)
        sources.append(places[:first])
        targets.append(places[first:])
    return sources, targets


def _encode(llm: PreTrainedModel, embedded: Tensor, sources: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = [embedded[tuple(source.T)] for source in sources]
    rows = nn.utils.rnn.pad_sequence(parts, batch_first=True)  # unlike `padded` with a gradient
    counts = torch.tensor([len(source) for source in sources], device=embedded.device)
    mask = (torch.arange(rows.shape[1], device=embedded.device)[None] < counts[:, None]).long()
    return llm.get_encoder()(inputs_embeds=rows, attention_mask=mask).last_hidden_state, mask
