"""Batches: the samples come back out of every layout, and placeholders that stay empty go without a trace."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.batch import Batch, Layout, Pair, collate
from models.rendering import IGNORED, Audio, Rendered

LAYOUTS: tuple[Layout, ...] = ("right", "left", "packed")
PAD, FILLER = 0, 7


@dataclass(frozen=True)
class Clip:
    """`tokens` placeholders behind `text` other tokens; the connector makes `made` of them, out of `frames` frames."""

    text: int
    tokens: int
    made: int
    frames: int


Sample = tuple[list[Clip], int, int]  # clips, learnt tokens behind the last one, tokens of the instruction


@st.composite
def samples(draw: st.DrawFn, least: int = 0) -> Sample:
    """A clip takes `least` positions or more. Text always stands behind the last one, as in every prompt."""
    clips = []
    for _ in range(draw(st.integers(0, 2))):
        tokens = draw(st.integers(least, 4))
        made = draw(st.integers(least, tokens))
        clips.append(Clip(draw(st.integers(0, 2)), tokens, made, draw(st.integers(1, 3))))
    return clips, draw(st.integers(1, 3)), draw(st.integers(0, 2))


def batches(least: int = 0) -> st.SearchStrategy[list[Sample]]:
    return st.lists(samples(least), min_size=1, max_size=4)


def pairs_of(rows: list[Sample], shortened: bool = False) -> list[Pair]:
    """The same tokens and features for the same samples, with the placeholders reserved or those made."""
    pairs: list[Pair] = []
    for number, (clips, answer, asked) in enumerate(rows):
        rendered, fresh, audios = Rendered(), 100 * (number + 1), []
        rendered.instruction = [fresh + 90 + i for i in range(asked)]
        for clip in clips:
            rendered.tokens(list(range(fresh, fresh + clip.text)))
            rendered.audio(clip.made if shortened else clip.tokens, FILLER)
            fresh += clip.text
            audios.append(Audio({"speech": torch.full((clip.frames, 2), float(fresh))}))
        pairs.append((rendered.tokens(list(range(fresh, fresh + answer)), learn=True), audios))
    return pairs


def counts_of(rows: list[Sample]) -> Tensor:
    return torch.tensor([clip.made for clips, _, _ in rows for clip in clips], dtype=torch.long)


def assert_same(one: Batch, other: Batch) -> None:
    """Every field; which id stands where nothing is (the backbone never attends to it) is left open."""
    for field in fields(Batch):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if field.name == "ids":
            assert first.shape == second.shape
            valid = other.segments > 0
            assert torch.equal(first[valid], second[valid])
        elif isinstance(first, Tensor):
            assert torch.equal(first, second), field.name
        elif isinstance(first, dict):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[role], second[role]) for role in first), field.name
        else:
            assert first == second, field.name


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=80)
@given(rows=batches())
def test_a_shortened_batch_is_the_batch_of_shortened_sequences(layout: Layout, rows: list[Sample]) -> None:
    batch = collate(pairs_of(rows), PAD, layout)
    shorter = batch.without(batch.surplus(counts_of(rows)))
    assert_same(shorter, collate(pairs_of(rows, shortened=True), PAD, layout))
    assert_same(batch, collate(pairs_of(rows), PAD, layout))  # the batch itself is left as it was


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(rows=batches())
def test_without_nothing_is_the_same_batch(layout: Layout, rows: list[Sample]) -> None:
    batch = collate(pairs_of(rows), PAD, layout)
    assert not bool(batch.surplus(batch.clip_tokens).any())
    assert_same(batch.without(batch.surplus(batch.clip_tokens)), batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=80)
@given(rows=batches())
def test_pairs_undo_collate(layout: Layout, rows: list[Sample]) -> None:
    given_pairs = pairs_of(rows)
    batch = collate(given_pairs, PAD, layout)
    found = batch.pairs(batch.features, batch.lengths)
    assert [rendered for rendered, _ in found] == [rendered for rendered, _ in given_pairs]
    for (_, clips), (_, expected) in zip(found, given_pairs, strict=True):
        assert len(clips) == len(expected)
        for clip, other in zip(clips, expected, strict=True):
            assert torch.equal(clip.features["speech"], other.features["speech"])


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(rows=batches(least=1))
def test_a_shortened_batch_still_knows_whose_clip_is_whose(layout: Layout, rows: list[Sample]) -> None:
    batch = collate(pairs_of(rows), PAD, layout)
    shorter = batch.without(batch.surplus(counts_of(rows)))
    owners = [number for number, (clips, _, _) in enumerate(rows, start=1) for _ in clips]
    assert shorter.clip_segments().tolist() == owners
    assert shorter.label_tokens == batch.label_tokens
    assert shorter.tokens == batch.tokens - int(batch.clip_tokens.sum() - counts_of(rows).sum())


def test_the_last_placeholders_of_a_clip_are_the_surplus() -> None:
    rows: list[Sample] = [([Clip(1, 3, 1, 2)], 1, 0), ([Clip(0, 2, 2, 1), Clip(0, 1, 0, 1)], 1, 0)]
    batch = collate(pairs_of(rows), PAD, "packed")
    surplus = batch.surplus(counts_of(rows))
    assert surplus.tolist() == [False, True, True, False, False, True]
    shorter = batch.without(surplus)
    assert shorter.ids.tolist() == [[100, FILLER, 101, FILLER, FILLER, 200]]
    assert shorter.labels.tolist() == [[IGNORED, IGNORED, 101, IGNORED, IGNORED, 200]]
    assert shorter.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert shorter.segments.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert shorter.audio_columns.tolist() == [1, 3, 4]
    assert shorter.clip_columns.tolist() == [1, 3, 5]
    assert shorter.clip_tokens.tolist() == [1, 2, 0]


def test_rows_of_different_surplus_are_padded_where_the_layout_has_its_padding() -> None:
    rows: list[Sample] = [([Clip(0, 3, 1, 1)], 1, 0), ([Clip(0, 3, 3, 1)], 1, 0)]
    for layout, columns in (("right", [0, 0, 1, 2]), ("left", [2, 0, 1, 2])):
        batch = collate(pairs_of(rows), PAD, layout)  # type: ignore[arg-type]
        shorter = batch.without(batch.surplus(counts_of(rows)))
        assert shorter.audio_columns.tolist() == columns
        assert (shorter.segments > 0).sum(1).tolist() == [2, 4]
        assert bool((shorter.segments[0] == 0)[-1 if layout == "right" else 0])


def test_more_tokens_than_placeholders_are_refused() -> None:
    batch = collate(pairs_of([([Clip(0, 2, 2, 1)], 1, 0)]), PAD)
    with pytest.raises(ValueError, match=r"made \[3\] tokens for clips of \[2\] audio positions"):
        batch.surplus(torch.tensor([3]))
