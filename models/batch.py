"""A batch as the backbone takes it, laid out as padded rows or as one packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from models.rendering import IGNORED, Audio, Rendered

Layout = Literal["right", "left", "packed"]
Pair = tuple[Rendered, Sequence[Audio]]  # a sequence and the clips that it uses, in their order


@dataclass
class Batch:
    """Token rows and the audio that fills their placeholders.

    ids, labels, positions, segments: `(rows, length)`; segment 0 is padding, samples count from 1.
    audio_rows, audio_columns: `(placeholders,)`, in the order of the clips and of their tokens.
    clip_rows, clip_columns, clip_tokens: `(clips,)`, where a clip begins and how many placeholders it has.
    features[role]: `(clips, frames, width)`, zero-padded; lengths[role]: `(clips,)`.
    waveforms: each `(samples,)`, in the place of features where an encoder learns.
    branches: `(rows, length)`, where a row holds several ends of one beginning: 0 for the beginning, which all ends
    see, k for the k-th end, which sees itself and no other.
    instructions, instruction_lengths: `(samples, length)` zero-padded and `(samples,)`, for systems that read the
    request apart from the sequence.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    audio_rows: Tensor
    audio_columns: Tensor
    clip_rows: Tensor
    clip_columns: Tensor
    clip_tokens: Tensor
    features: dict[str, Tensor]
    lengths: dict[str, Tensor]
    layout: Layout
    waveforms: list[Tensor] = field(default_factory=list)
    instructions: Tensor | None = None
    instruction_lengths: Tensor | None = None
    branches: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        features = {role: value.to(device) for role, value in self.features.items()}
        lengths = {role: value.to(device) for role, value in self.lengths.items()}
        waveforms = [waveform.to(device) for waveform in self.waveforms]
        return replace(self, features=features, lengths=lengths, waveforms=waveforms, **moved)

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

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

    @property
    def samples(self) -> int:
        return int(self.segments.max())

    def clip_segments(self) -> Tensor:
        """The sample that each clip belongs to, `(clips,)`, counting from 1 as `segments` do."""
        return self.segments[self.clip_rows, self.clip_columns]

    def pairs(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> list[tuple[Rendered, list[Audio]]]:
        """The samples that were collated, with clips cut out of `(clips, frames, width)` features."""
        found = []
        owners = self.clip_segments()
        for sample in range(1, self.samples + 1):
            row, columns = (self.segments == sample).nonzero().unbind(1)
            start = int(columns[0])
            clips = (owners == sample).nonzero()[:, 0].tolist()
            inside = (self.audio_rows == row[0]) & torch.isin(self.audio_columns, columns)
            rendered = Rendered(
                self.ids[row, columns].tolist(),
                self.labels[row, columns].tolist(),
                (self.audio_columns[inside] - start).tolist(),
                [int(self.clip_columns[clip]) - start for clip in clips],
                [int(self.clip_tokens[clip]) for clip in clips],
                self._instruction(sample),
            )
            found.append((rendered, [Audio(_cut(features, lengths, clip)) for clip in clips]))
        return found

    def _instruction(self, sample: int) -> list[int]:
        if self.instructions is None or self.instruction_lengths is None:
            return []
        return self.instructions[sample - 1, : int(self.instruction_lengths[sample - 1])].tolist()  # type: ignore[no-any-return]

    def label_sequences(self) -> list[Tensor]:
        """The labels of each sample, placeholders and masked tokens included."""
        return [self.labels[self.segments == i] for i in range(1, self.samples + 1)]

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
        if not self.packed and self.branches is None:
            return None if bool((self.segments > 0).all()) else (self.segments > 0).long()
        length = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        if self.branches is not None:
            seen = self.branches[:, None, :]
            same &= (seen == 0) | (seen == self.branches[:, :, None])
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        mask = torch.zeros(same.shape, dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~(same & causal), torch.finfo(dtype).min)[:, None]

    def surplus(self, counts: Tensor) -> Tensor:
        """Placeholders that stay empty when clip i makes `counts[i]` tokens, `(placeholders,)`.

        Raises ValueError if a clip makes more than it has placeholders.
        """
        if bool((counts > self.clip_tokens).any()):
            raise ValueError(
                f"the connector made {counts.tolist()} tokens for clips of {self.clip_tokens.tolist()} audio positions"
            )
        clip = _clips_of(self.clip_tokens)
        begin = self.clip_tokens.cumsum(0) - self.clip_tokens
        return torch.arange(len(clip), device=counts.device) - begin[clip] >= counts[clip]

    def without(self, surplus: Tensor) -> Batch:
        """The batch without some of its placeholders, `(placeholders,)` True: rows are shorter, order is kept.

        For connectors whose tokens depend on what is said: the plan reserves the most there can be.
        """
        unwanted = self.segments == 0
        unwanted[self.audio_rows[surplus], self.audio_columns[surplus]] = True
        before = (~unwanted).cumsum(1) - (~unwanted).long()  # tokens of the row that stay and stand before a column
        kept = (~unwanted).sum(1)
        length = int(kept.max())
        left = self.layout == "left"
        moved = before + (length - kept)[:, None] if left else before
        order = (~unwanted if left else unwanted).long().argsort(dim=1, stable=True)
        order = order[:, -length:] if left else order[:, :length]
        empty = unwanted.gather(1, order)
        segments = self.segments.gather(1, order).masked_fill(empty, 0)
        branches = None if self.branches is None else self.branches.gather(1, order).masked_fill(empty, 0)
        rows, columns = self.audio_rows[~surplus], self.audio_columns[~surplus]
        counts = torch.bincount(_clips_of(self.clip_tokens)[~surplus], minlength=len(self.clip_tokens))
        return replace(
            self,
            ids=self.ids.gather(1, order),
            labels=self.labels.gather(1, order).masked_fill(empty, IGNORED),
            positions=positions_of(segments, branches),
            branches=branches,
            segments=segments,
            audio_rows=rows,
            audio_columns=moved[rows, columns],
            clip_columns=moved[self.clip_rows, self.clip_columns],
            clip_tokens=counts,
        )


def collate(samples: Sequence[Pair], pad_id: int, layout: Layout = "right") -> Batch:
    """Lay samples out as rows (padded on the right or the left) or one after the other in a single row."""
    length = sum(len(r) for r, _ in samples) if layout == "packed" else max(len(r) for r, _ in samples)
    rows = 1 if layout == "packed" else len(samples)
    ids = torch.full((rows, length), pad_id)
    labels = torch.full((rows, length), IGNORED)
    positions, segments = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    audio_at: list[tuple[int, int]] = []
    clip_at: list[tuple[int, int, int]] = []
    offset = 0
    for i, (rendered, _) in enumerate(samples):
        row = 0 if layout == "packed" else i
        start = offset if layout == "packed" else (length - len(rendered) if layout == "left" else 0)
        span = slice(start, start + len(rendered))
        ids[row, span] = torch.tensor(rendered.ids)
        labels[row, span] = torch.tensor(rendered.labels)
        positions[row, span] = torch.arange(len(rendered))
        segments[row, span] = i + 1
        audio_at += [(row, start + column) for column in rendered.audio_at]
        clip_at += [(row, start + at, n) for at, n in zip(rendered.clip_at, rendered.clip_tokens, strict=True)]
        offset += len(rendered)
    audio_rows, audio_columns = torch.tensor(audio_at, dtype=torch.long).reshape(-1, 2).unbind(1)
    clip_rows, clip_columns, clip_tokens = torch.tensor(clip_at, dtype=torch.long).reshape(-1, 3).unbind(1)
    clips = [clip for rendered, given in samples for clip in given[: len(rendered.clip_at)]]
    features, lengths, waveforms = _stack(clips)
    asked = [torch.tensor(rendered.instruction, dtype=torch.long) for rendered, _ in samples]
    return Batch(
        ids,
        labels,
        positions,
        segments,
        audio_rows,
        audio_columns,
        clip_rows,
        clip_columns,
        clip_tokens,
        features,
        lengths,
        layout,
        waveforms,
        padded(asked) if any(map(len, asked)) else None,
        torch.tensor([len(ids) for ids in asked]) if any(map(len, asked)) else None,
    )


def _stack(clips: Sequence[Audio]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Features as they are stored (a cache holds bfloat16), each copied once from where it lies; or waveforms."""
    waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
    if waveforms:
        return {}, {}, waveforms
    roles = list(clips[0].features) if clips else []
    features = {role: padded([clip.features[role] for clip in clips]) for role in roles}
    lengths = {role: torch.tensor([len(clip.features[role]) for clip in clips]) for role in roles}
    return features, lengths, []


def padded(clips: Sequence[Tensor]) -> Tensor:
    """Clips, each `(frames, …)` → `(clips, longest, …)`, zero behind a clip's end."""
    longest = max(map(len, clips))
    rows = clips[0].new_empty(len(clips), longest, *clips[0].shape[1:])
    for row, clip in zip(rows, clips, strict=True):
        row[: len(clip)] = clip
        row[len(clip) :] = 0
    return rows


def _cut(features: dict[str, Tensor], lengths: dict[str, Tensor], clip: int) -> dict[str, Tensor]:
    return {role: frames[clip, : int(lengths[role][clip])] for role, frames in features.items()}


def _clips_of(clip_tokens: Tensor) -> Tensor:
    """The clip that each placeholder belongs to, `(placeholders,)`."""
    return torch.repeat_interleave(torch.arange(len(clip_tokens), device=clip_tokens.device), clip_tokens)


def positions_of(segments: Tensor, branches: Tensor | None = None) -> Tensor:
    """Positions that count from 0 in each sample, and in each branch from its beginning's end, `(rows, length)`; 0 for
    padding."""
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    if branches is not None:
        begins[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    positions = at - torch.where(begins, at, 0).cummax(1).values
    if branches is not None:
        trunk = ((segments > 0) & (branches == 0)).sum(1, keepdim=True)
        positions = positions + torch.where(branches > 0, trunk, 0)
    return torch.where(segments > 0, positions, 0)
