"""A batch as the backbone takes it, laid out as padded rows or as one packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from models.rendering import IGNORED, Audio, Rendered

Layout = Literal["right", "left", "packed"]


@dataclass
class Batch:
    """Token rows and the audio that fills their placeholders.

    ids, labels, positions, segments: `(rows, length)`; segment 0 is padding, samples count from 1.
    audio_rows, audio_columns: `(placeholders,)`, in the order of the clips and of their tokens.
    features[role]: `(clips, frames, width)`, zero-padded; lengths[role]: `(clips,)`.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    audio_rows: Tensor
    audio_columns: Tensor
    features: dict[str, Tensor]
    lengths: dict[str, Tensor]
    packed: bool

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        features = {role: value.to(device) for role, value in self.features.items()}
        lengths = {role: value.to(device) for role, value in self.lengths.items()}
        return replace(self, features=features, lengths=lengths, **moved)

    @property
    def tokens(self) -> int:
        return int((self.segments > 0).sum())

    @property
    def padding(self) -> float:
        """Share of the positions that no sample fills."""
        return 1.0 - self.tokens / self.ids.numel()

    @property
    def label_tokens(self) -> int:
        """Tokens that carry loss: the first of a row or segment is never predicted."""
        return int((self.targets() != IGNORED).sum())

    def label_sequences(self) -> list[Tensor]:
        """The labels of each sample, placeholders and masked tokens included."""
        return [self.labels[self.segments == i] for i in range(1, int(self.segments.max()) + 1)]

    def targets(self) -> Tensor:
        """Labels shifted to the position that predicts them, `(rows, length)`; never across segments."""
        targets = torch.full_like(self.labels, IGNORED)
        same = self.segments[:, 1:] == self.segments[:, :-1]
        targets[:, :-1] = torch.where(same, self.labels[:, 1:], IGNORED)
        return targets

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """None where rows are full, `(rows, length)` for padding, additive `(rows, 1, length, length)` for packing.

        The dense mask of packed rows is for backbones that cannot take the borders of samples (models/attention.py);
        restarting position ids alone are silently wrong in transformers.
        """
        if not self.packed:
            return None if bool((self.segments > 0).all()) else (self.segments > 0).long()
        length = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        mask = torch.zeros(same.shape, dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]


def collate(samples: Sequence[tuple[Rendered, Audio]], pad_id: int, layout: Layout = "right") -> Batch:
    """Lay samples out as rows (padded on the right or the left) or one after the other in a single row."""
    length = sum(len(r) for r, _ in samples) if layout == "packed" else max(len(r) for r, _ in samples)
    rows = 1 if layout == "packed" else len(samples)
    ids = torch.full((rows, length), pad_id)
    labels = torch.full((rows, length), IGNORED)
    positions, segments = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    audio_rows: list[int] = []
    audio_columns: list[int] = []
    offset = 0
    for i, (rendered, _) in enumerate(samples):
        row = 0 if layout == "packed" else i
        start = offset if layout == "packed" else (length - len(rendered) if layout == "left" else 0)
        span = slice(start, start + len(rendered))
        ids[row, span] = torch.tensor(rendered.ids)
        labels[row, span] = torch.tensor(rendered.labels)
        positions[row, span] = torch.arange(len(rendered))
        segments[row, span] = i + 1
        audio_rows += [row] * len(rendered.audio_at)
        audio_columns += [start + column for column in rendered.audio_at]
        offset += len(rendered)
    features, lengths = _stack([audio for _, audio in samples])
    return Batch(
        ids,
        labels,
        positions,
        segments,
        torch.tensor(audio_rows, dtype=torch.long),
        torch.tensor(audio_columns, dtype=torch.long),
        features,
        lengths,
        layout == "packed",
    )


def _stack(audios: list[Audio]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features as they are stored (a cache holds bfloat16), each copied once from where it lies."""
    with_audio = [audio for audio in audios if audio.features]
    roles = list(with_audio[0].features) if with_audio else []
    features = {role: padded([audio.features[role] for audio in with_audio]) for role in roles}
    lengths = {role: torch.tensor([len(a.features[role]) for a in with_audio]) for role in roles}
    return features, lengths


def padded(clips: Sequence[Tensor]) -> Tensor:
    """Clips, each `(frames, width)` → `(clips, longest, width)`, zero behind a clip's end."""
    longest = max(map(len, clips))
    rows = clips[0].new_empty(len(clips), longest, *clips[0].shape[1:])
    for row, clip in zip(rows, clips, strict=True):
        row[: len(clip)] = clip
        row[len(clip) :] = 0
    return rows
