"""Which words of a reference and a hypothesis differ, shown on the texts as they were written."""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import jiwer

from components.evaluation.normalise import is_unspaced, normalise

Mark = Literal["equal", "substitute", "delete", "insert"]


class Piece(NamedTuple):
    """A word (or a character of an unspaced language) and what became of it."""

    text: str
    mark: Mark


def diff(reference: str, hypothesis: str, language: str | None = None) -> tuple[list[Piece], list[Piece]]:
    """Pieces of the reference and of the hypothesis; joined with spaces (unspaced: nothing) they are the texts.

    The alignment is that of the metrics, on normalised words; a written word is marked if any normalised word of it
    is, and one that normalises to nothing (a dash) counts as equal.
    """
    left, right = _pieces(reference, language), _pieces(hypothesis, language)
    left_words = [(i, word) for i, (_, words) in enumerate(left) for word in words]
    right_words = [(i, word) for i, (_, words) in enumerate(right) for word in words]
    aligned = jiwer.process_words(" ".join(w for _, w in left_words), " ".join(w for _, w in right_words))
    left_marks: list[Mark] = ["equal"] * len(left)
    right_marks: list[Mark] = ["equal"] * len(right)
    for chunk in aligned.alignments[0]:
        mark = cast(Mark, chunk.type)
        for i, _ in left_words[chunk.ref_start_idx : chunk.ref_end_idx]:
            left_marks[i] = mark if mark != "equal" else left_marks[i]
        for i, _ in right_words[chunk.hyp_start_idx : chunk.hyp_end_idx]:
            right_marks[i] = mark if mark != "equal" else right_marks[i]
    return (
        [Piece(text, mark) for (text, _), mark in zip(left, left_marks, strict=True)],
        [Piece(text, mark) for (text, _), mark in zip(right, right_marks, strict=True)],
    )


def _pieces(text: str, language: str | None) -> list[tuple[str, list[str]]]:
    """Each written piece with the normalised words in it."""
    written = list("".join(text.split())) if is_unspaced(language) else text.split()
    return [(piece, normalise(piece, language).split()) for piece in written]
