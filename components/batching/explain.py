"""What a batch teaches, token by token, as plain data: text, span, position, segment, label and weight of the loss.

Nothing is computed anew: what is learnt comes from `Batch.targets()`, what is trained from the model's own groups, so
that the view cannot say something else than the training does. `explain_page` shows the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.batch import Batch, Layout
from models.contract import SpeechLLM
from models.preset import Preset
from models.recipe import Loss, Stage
from models.rendering import IGNORED

Span = Literal["text", "audio", "unit", "padding"]
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
PADDING = "·"
UNIT = re.compile(r"<\d+>")


@dataclass(frozen=True)
class Token:
    """One position of a row.

    text: printable; `♪2·3` is the third audio position of the batch's second clip. label: what the model must predict
    at this very position from those before it (the logit that does so is one position earlier), None where nothing is
    learnt. weight: share of this label in the loss of the global batch, 0 where nothing is learnt.
    """

    text: str
    id: int
    span: Span
    position: int
    segment: int
    label: str | None
    weight: float


@dataclass(frozen=True)
class Clip:
    """The audio of a sample: frames per encoder role (none if the batch holds units), and the tokens it takes."""

    key: str
    segment: int
    frames: dict[str, int]
    tokens: int


@dataclass(frozen=True)
class Alignment:
    """What CTC aligns for a sample: its labels, the audio positions there are and those that the labels need."""

    key: str
    segment: int
    labels: list[str]
    positions: int
    needed: int


@dataclass(frozen=True)
class Group:
    """A parameter group in a stage; `rate` is its peak learning rate, None where it is frozen."""

    name: str
    tensors: int
    parameters: int
    trainable: bool
    rate: float | None


@dataclass(frozen=True)
class Explained:
    """A batch of a stage as rows of tokens; `keys[segment - 1]` is the sample of a segment."""

    stage: str
    loss: Loss
    layout: Layout
    rows: list[list[Token]]
    keys: list[str]
    lengths: list[Clip]
    labels_in_global_batch: int
    groups: list[Group] = field(default_factory=list)
    alignments: list[Alignment] = field(default_factory=list)  # of a CTC stage

    @property
    def tokens(self) -> int:
        """Positions that hold something, audio included."""
        return sum(token.span != "padding" for row in self.rows for token in row)

    @property
    def labels(self) -> int:
        return sum(token.label is not None for row in self.rows for token in row)

    @property
    def padding(self) -> float:
        """Share of the positions that hold nothing."""
        return 1 - self.tokens / max(1, sum(len(row) for row in self.rows))


def explain_batch(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    keys: Sequence[str],
    labels_in_global_batch: int,
    unit_ids: range | None = None,
    *,
    stage: Stage,
    groups: Sequence[Group] = (),
) -> Explained:
    """The tokens of a batch and what each adds to the loss of `stage`.

    keys: one a sample, in the batch's order. labels_in_global_batch: of all ranks; `label_count` of a batch that is
    the whole. unit_ids: from `units_of`. groups: from `trainable_groups`.
    Raises ValueError where keys, labels or clips do not fit the batch.
    """
    batch = batch.to(torch.device("cpu"))
    blank = _blank(stage, tokenizer)
    labels = _labels(batch, blank)
    _check(batch, keys, int((labels != IGNORED).sum()), labels_in_global_batch)
    used = torch.cat([batch.ids.flatten(), labels[labels != IGNORED]]).unique().tolist()
    texts = dict(zip(used, token_texts(tokenizer, used), strict=True))
    rows = _rows(batch, labels, texts, 1 / max(1, labels_in_global_batch), unit_ids or range(0))
    lengths = _lengths(batch, keys, rows)
    alignments = _alignments(labels, batch.segments, texts, lengths, keys) if stage.loss == "ctc" else []
    return Explained(
        stage.name,
        stage.loss,
        _layout(batch),
        rows,
        list(keys),
        lengths,
        labels_in_global_batch,
        list(groups),
        alignments,
    )


def label_count(batch: Batch, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> int:
    """Labels of a batch under the loss of a stage; CTC does not count the end token, which is its blank."""
    return int((_labels(batch, _blank(stage, tokenizer)) != IGNORED).sum())


def _blank(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The label that CTC losses leave out: the end token."""
    return tokenizer.eos_token_id if stage.loss in ("ctc", "letters") else None


def trainable_groups(model: SpeechLLM, stage: Stage) -> list[Group]:
    """The parameter groups that the model has, in the contract's order; the model is left as it is.

    Raises ValueError for a group in `stage.train` that the model does not have, as `SpeechLLM.freeze` does.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learning = set(model.trained_by(stage.train))
    return [
        Group(
            name,
            len(members),
            sum(sizes[member] for member in members),
            bool(learning & set(members)),
            stage.groups.get(name, stage.optimiser).lr if learning & set(members) else None,
        )
        for name, members in model.parameter_groups().items()
        if members
    ]


def units_of(architecture: type[SpeechLLM], preset: Preset, tokenizer: PreTrainedTokenizerBase) -> range | None:
    """The ids of an architecture's unit tokens `<0>`, `<1>`, …; None if it has none. The tokenizer must hold them."""
    units = [token for token in architecture.added_tokens(preset) if UNIT.fullmatch(token)]
    if not units:
        return None
    ids = tokenizer.convert_tokens_to_ids(units)
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"the unit tokens {units[0]} to {units[-1]} have no ids in a row: add them to the tokenizer")
    return range(ids[0], ids[-1] + 1)


def samples_in(row: Sequence[Token]) -> list[tuple[int, list[Token]]]:
    """The samples of a row with their segment; padding stays with the sample beside it, so no token is lost."""
    found: list[tuple[int, list[Token]]] = []
    for segment, tokens in groupby(row, key=lambda token: token.segment):
        if found and 0 in (segment, found[-1][0]):
            before, held = found[-1]
            found[-1] = (before or segment, [*held, *tokens])
        else:
            found.append((segment, list(tokens)))
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each id as text that can be printed: white space as signs, bytes that are no character alone as `\\xc3`."""
    whole = set(tokenizer.get_added_vocab().values())
    return [_text(tokenizer, i, whole) for i in ids]


def printable(text: str) -> str:
    """White space as signs; everything else as `harmless` has it."""
    return harmless("".join(SIGNS.get(sign, sign) for sign in text))


def harmless(text: str) -> str:
    """Control and direction characters escaped, so that no text can steer a terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int, whole: set[int]) -> str:
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # a model's table may be longer than its tokenizer's
        return f"#{token_id}"
    if token_id in whole:
        return printable(piece)
    if "▁" in piece:  # SentencePiece: decoded alone, a piece loses the space before it
        return printable(piece.replace("▁", " "))
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text and all(sign in BYTES for sign in piece):
        text = bytes(BYTES[sign] for sign in piece).decode(errors="backslashreplace")
    return printable(text or piece)


def _byte_signs() -> dict[str, int]:
    """The signs that byte-level BPE (GPT-2) writes bytes with: visible Latin-1 as itself, the rest from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_signs()


def _labels(batch: Batch, blank: int | None) -> Tensor:
    """What is learnt at each position, `(rows, length)`; `IGNORED` elsewhere. With a blank: the labels of CTC."""
    if blank is not None:
        return batch.labels.masked_fill((batch.labels == blank) | (batch.segments == 0), IGNORED)
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, 1:] = batch.targets()[:, :-1]  # back from the position that predicts to the one that is predicted
    return labels


def _check(batch: Batch, keys: Sequence[str], labels: int, labels_in_global_batch: int) -> None:
    samples = int(batch.segments.max())
    if len(keys) != samples:
        raise ValueError(f"{len(keys)} keys for a batch of {samples} samples: give one key a sample, in its order")
    if labels > labels_in_global_batch:
        raise ValueError(f"{labels} labels in a part of a global batch that has {labels_in_global_batch}: count all")
    clips = len(batch.waveforms) or max((len(lengths) for lengths in batch.lengths.values()), default=0)
    if clips != len(batch.clip_rows):
        raise ValueError(f"the rows have places for {len(batch.clip_rows)} clips, but the batch holds {clips}")


def _rows(batch: Batch, labels: Tensor, texts: dict[int, str], weight: float, units: range) -> list[list[Token]]:
    audio = _audio_names(batch)
    rows = []
    for r, columns in enumerate(zip(batch.ids, batch.positions, batch.segments, labels, strict=True)):
        row = []
        for c, (token, position, segment, label) in enumerate(zip(*(each.tolist() for each in columns), strict=True)):
            span = _span(segment, (r, c) in audio, token in units)
            text = PADDING if span == "padding" else audio.get((r, c), texts[token])
            learnt = label != IGNORED
            row.append(
                Token(text, token, span, position, segment, texts[label] if learnt else None, weight if learnt else 0.0)
            )
        rows.append(row)
    return rows


def _span(segment: int, audio: bool, unit: bool) -> Span:
    if segment == 0:
        return "padding"
    return "audio" if audio else "unit" if unit else "text"


def _audio_names(batch: Batch) -> dict[tuple[int, int], str]:
    """`♪clip·position` of each placeholder by row and column."""
    names = [f"♪{clip}·{at}" for clip, n in enumerate(batch.clip_tokens.tolist(), 1) for at in range(1, n + 1)]
    places = zip(batch.audio_rows.tolist(), batch.audio_columns.tolist(), strict=True)
    return dict(zip(places, names, strict=True))


def _lengths(batch: Batch, keys: Sequence[str], rows: list[list[Token]]) -> list[Clip]:
    """The clips in the batch's order; with units only those samples that hold some."""
    frames = [{role: int(lengths[i]) for role, lengths in batch.lengths.items()} for i in range(len(batch.clip_rows))]
    if frames:
        placed = zip(batch.clip_segments().tolist(), frames, batch.clip_tokens.tolist(), strict=True)
        return [Clip(keys[segment - 1], segment, each, tokens) for segment, each, tokens in placed]
    units = Counter(token.segment for row in rows for token in row if token.span == "unit")
    return [Clip(keys[segment - 1], segment, {}, units[segment]) for segment in sorted(units)]


def _alignments(
    labels: Tensor, segments: Tensor, texts: dict[int, str], lengths: list[Clip], keys: Sequence[str]
) -> list[Alignment]:
    positions = {clip.segment: clip.tokens for clip in lengths}
    found = []
    for i, key in enumerate(keys, start=1):
        ids = [label for label in labels[segments == i].tolist() if label != IGNORED]
        needed = len(ids) + sum(one == other for one, other in pairwise(ids))  # equal neighbours need a blank between
        found.append(Alignment(key, i, [texts[label] for label in ids], positions.get(i, 0), needed))
    return found


def _layout(batch: Batch) -> Layout:
    if batch.packed:
        return "packed"
    return "left" if bool((batch.segments[:, 0] == 0).any()) else "right"
