"""Word and character error rate, accuracy, and by whom and what they differ: plain counts that add up.

An error rate is errors over reference length, summed over clips (never a mean of per-clip rates), counted by jiwer
on `components.evaluation.normalise`. Accuracy is the share of clips whose normalised texts are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jiwer
import numpy as np
from pydantic import BaseModel, ConfigDict

from components.evaluation.normalise import NORMALISATION, is_unspaced, normalise

NOT_STATED = "not stated"  # the group of clips without a language or a speaker
BOOTSTRAP = 1000  # resamples of the clips behind an interval

Metric = Literal["wer", "cer", "exact"]
Direction = Literal["lower", "higher"]


class Hypothesis(BaseModel):
    """One answer beside what it should have been; `before` is the answer of the untrained (or previous) model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    task: str  # "asr", "translate:en", "label:emotion", ...
    split: str
    language: str | None = None  # of the reference, which decides how it is normalised
    speaker: str | None = None
    reference: str
    hypothesis: str
    seconds: float = 0.0
    before: str | None = None
    choice: str | None = None  # label tasks: the likeliest of the known labels


class Rates(BaseModel):
    """What a group of clips comes to. A rate is None where there is nothing to count it on (no reference words)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    seconds: float
    words: int  # of the references; unspaced languages are not in it
    characters: int
    wer: float | None
    cer: float | None
    exact: float
    choice: float | None  # share of clips whose likeliest label is right; None where labels were not compared
    majority: float  # exact share of always answering the most frequent reference
    majority_answer: str
    substitutions: int  # these three in words, or in characters where there are no words
    deletions: int
    insertions: int
    interval: tuple[float, float] | None  # 95 %, of the task's main metric, by resampling clips


class TaskScores(BaseModel):
    """The rates of one task; `metric` names the one that counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Metric
    all: Rates
    by_split: dict[str, Rates]
    by_language: dict[str, Rates]  # this and the next over the split that `main_split` names
    by_speaker: dict[str, Rates]
    main_split: str
    confusion: dict[str, dict[str, int]] | None = None  # label tasks, main split: reference -> answer -> clips


class Scores(BaseModel):
    """The rates of an evaluation, task by task in order of appearance."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    normalisation: str = NORMALISATION
    tasks: dict[str, TaskScores]


class _Counts(NamedTuple):
    """Edits of one clip, in words and in characters; word counts are zero for unspaced languages."""

    words: int
    word_edits: tuple[int, int, int]  # substitutions, deletions, insertions
    characters: int
    character_edits: tuple[int, int, int]
    exact: bool
    choice: bool | None
    reference: str
    seconds: float


def score(hypotheses: Sequence[Hypothesis]) -> Scores:
    """Rates of every task, by split, language and speaker; ValueError if there is nothing to score."""
    if not hypotheses:
        raise ValueError("nothing to score: the evaluation produced no answer; are there clips in the chosen split?")
    tasks: dict[str, list[Hypothesis]] = {}
    for hypothesis in hypotheses:
        tasks.setdefault(hypothesis.task, []).append(hypothesis)
    return Scores(tasks={task: _score_task(task, rows) for task, rows in tasks.items()})


def score_before(hypotheses: Sequence[Hypothesis]) -> Scores | None:
    """The same for the answers that were given before training; None if no clip has one."""
    answered = [row for row in hypotheses if row.before is not None]
    rows = [row.model_copy(update={"hypothesis": row.before, "choice": None}) for row in answered]
    return score(rows) if rows else None


def main_metric(scores: Scores, split: str | None = None) -> tuple[str, float, Direction]:
    """Name (`asr/test/wer`), value and better direction of the number that a model is judged by.

    It is that of `asr` if there is one, else of the first task. ValueError if it is undefined (no reference words).
    """
    task = "asr" if "asr" in scores.tasks else next(iter(scores.tasks))
    result = scores.tasks[task]
    split = split or result.main_split
    if split not in result.by_split:
        raise ValueError(
            f"no clips of split {split!r} were evaluated for {task!r}; there are: {sorted(result.by_split)}"
        )
    value = rate_of(result.by_split[split], result.metric)
    if value is None:
        raise ValueError(f"{result.metric} of {task!r} is undefined: no reference of split {split!r} has a word in it")
    return f"{task}/{split}/{metric_name(result.metric)}", value, direction(result.metric)


def flat(scores: Scores) -> dict[str, float]:
    """`task/split/metric` → value for every defined rate: what MLflow and a table of runs take."""
    rows: dict[str, float] = {}
    for task, result in scores.tasks.items():
        for split, rates in result.by_split.items():
            values = {"wer": rates.wer, "cer": rates.cer, "accuracy": rates.exact, "majority": rates.majority}
            values |= {"choice": rates.choice}
            rows |= {f"{task}/{split}/{name}": value for name, value in values.items() if value is not None}
            rows[f"{task}/{split}/clips"] = float(rates.n)
    return rows


def metric_name(metric: Metric) -> str:
    return "accuracy" if metric == "exact" else metric


def direction(metric: Metric) -> Direction:
    return "higher" if metric == "exact" else "lower"


def rate_of(rates: Rates, metric: Metric) -> float | None:
    return {"wer": rates.wer, "cer": rates.cer, "exact": rates.exact}[metric]


def _score_task(task: str, rows: list[Hypothesis]) -> TaskScores:
    metric = _metric_of(task, rows)
    counts = _count(rows)
    splits = list(dict.fromkeys(row.split for row in rows))
    main_split = next((split for split in ("test", "dev") if split in splits), splits[0])

    def group(name: Callable[[Hypothesis], str], only: str | None = None) -> dict[str, Rates]:
        members: dict[str, list[_Counts]] = {}
        for row, count in zip(rows, counts, strict=True):
            if only is None or row.split == only:
                members.setdefault(name(row), []).append(count)
        return {key: _rates(members[key], metric) for key in sorted(members)}

    return TaskScores(
        metric=metric,
        all=_rates(counts, metric),
        by_split=group(lambda row: row.split),
        by_language=group(lambda row: row.language or NOT_STATED, main_split),
        by_speaker=group(lambda row: row.speaker or NOT_STATED, main_split),
        main_split=main_split,
        confusion=_confusion([row for row in rows if row.split == main_split]) if metric == "exact" else None,
    )


def _confusion(rows: Sequence[Hypothesis]) -> dict[str, dict[str, int]]:
    """Normalised reference → normalised answer → clips, sorted; an empty answer is an empty string."""
    pairs = Counter((normalise(row.reference, row.language), normalise(row.hypothesis, row.language)) for row in rows)
    table: dict[str, dict[str, int]] = {}
    for (reference, answer), clips in sorted(pairs.items()):
        table.setdefault(reference, {})[answer] = clips
    return table


def _metric_of(task: str, rows: Iterable[Hypothesis]) -> Metric:
    """Accuracy for labels; CER as soon as one clip of the task is in an unspaced language; else WER."""
    if task.startswith("label:"):
        return "exact"
    return "cer" if any(is_unspaced(row.language) for row in rows) else "wer"


def _count(rows: Sequence[Hypothesis]) -> list[_Counts]:
    references = [normalise(row.reference, row.language) for row in rows]
    answers = [normalise(row.hypothesis, row.language) for row in rows]
    words = _edits(jiwer.process_words(references, answers).alignments)
    characters = _edits(jiwer.process_characters(references, answers).alignments)
    counts = []
    for row, reference, answer, word, character in zip(rows, references, answers, words, characters, strict=True):
        unspaced = is_unspaced(row.language)
        counts.append(
            _Counts(
                words=0 if unspaced else len(reference.split()),
                word_edits=(0, 0, 0) if unspaced else word,
                characters=len(reference),
                character_edits=character,
                exact=reference == answer,
                choice=None if row.choice is None else normalise(row.choice, row.language) == reference,
                reference=reference,
                seconds=row.seconds,
            )
        )
    return counts


def _edits(alignments: Sequence[Sequence[jiwer.AlignmentChunk]]) -> list[tuple[int, int, int]]:
    """Substitutions, deletions and insertions of each clip."""
    found = []
    for chunks in alignments:
        totals = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
        for chunk in chunks:
            totals[chunk.type] += max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        found.append((totals["substitute"], totals["delete"], totals["insert"]))
    return found


def _rates(counts: Sequence[_Counts], metric: Metric) -> Rates:
    words = sum(count.words for count in counts)
    characters = sum(count.characters for count in counts)
    word_edits = [sum(column) for column in zip(*(count.word_edits for count in counts), strict=True)]
    character_edits = [sum(column) for column in zip(*(count.character_edits for count in counts), strict=True)]
    # Ties go to the first in the alphabet, so that the report does not depend on the order of the clips.
    answer, frequent = min(Counter(count.reference for count in counts).items(), key=lambda item: (-item[1], item[0]))
    shown = word_edits if words else character_edits
    chosen = [count.choice for count in counts if count.choice is not None]
    return Rates(
        n=len(counts),
        seconds=round(sum(count.seconds for count in counts), 3),
        words=words,
        characters=characters,
        wer=sum(word_edits) / words if words else None,
        cer=sum(character_edits) / characters if characters else None,
        exact=sum(count.exact for count in counts) / len(counts),
        choice=sum(chosen) / len(counts) if len(chosen) == len(counts) else None,
        majority=frequent / len(counts),
        majority_answer=answer,
        substitutions=shown[0],
        deletions=shown[1],
        insertions=shown[2],
        interval=_interval(counts, metric),
    )


def _interval(counts: Sequence[_Counts], metric: Metric) -> tuple[float, float] | None:
    """95 % percentile bootstrap over clips, seed 0; None for fewer than two clips or no reference length.

    Source: Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation, ICASSP 2004.
    """
    if metric == "exact":
        errors, lengths = [int(count.exact) for count in counts], [1] * len(counts)
    elif metric == "cer":
        errors, lengths = [sum(count.character_edits) for count in counts], [count.characters for count in counts]
    else:
        errors, lengths = [sum(count.word_edits) for count in counts], [count.words for count in counts]
    if len(counts) < 2 or not sum(lengths):
        return None
    draws = np.random.default_rng(0).multinomial(len(counts), [1 / len(counts)] * len(counts), size=BOOTSTRAP)
    totals = draws @ np.array(lengths)
    rates = (draws @ np.array(errors))[totals > 0] / totals[totals > 0]
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)
