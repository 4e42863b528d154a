"""CTC of a connector's output against the backbone's own token embeddings.

The connector learns to put, at each audio position, the embedding of the token that is spoken there. The backbone is
not run: only a product with the rows of its embedding table that the labels use, so an epoch costs seconds where
next-token loss through the backbone costs minutes. Graves et al. (2006) for the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def connector_ctc(
    tokens: Tensor, counts: Tensor, targets: list[Tensor], embeddings: Tensor, vocabulary: Tensor, blank: int
) -> Tensor:
    """Summed CTC loss of `(clips, tokens, width)` with `(clips,)` valid positions.

    targets: token ids per clip. embeddings: `(vocabulary of the backbone, width)`. vocabulary: sorted ids that
    may be predicted, `blank` among them. Clips with more labels than positions give no loss.
    """
    rows = nn.functional.normalize(embeddings[vocabulary].detach().float(), dim=-1)
    scale = embeddings[vocabulary].detach().float().norm(dim=-1).mean()
    # dot product with unit rows: an output of the embeddings' own length gives logits of about `sharpness`
    logits = tokens.float() @ rows.T * (SHARPNESS / scale)
    blank_at = int(torch.searchsorted(vocabulary, torch.tensor(blank)))
    labels = torch.cat([torch.searchsorted(vocabulary, target) for target in targets])
    lengths = torch.tensor([len(target) for target in targets])
    return nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        labels,
        counts,
        lengths,
        blank=blank_at,
        reduction="sum",
        zero_infinity=True,
    )


SHARPNESS = 10.0
