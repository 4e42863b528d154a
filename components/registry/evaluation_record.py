"""What a model was measured on and its errors clip by clip: `evaluation.json` of a model's folder.

The counts stand in the order of the clips' keys, and a digest says which clips those are. So two models can be
compared clip by clip, and the file holds no key, no name and no sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

import jiwer
from pydantic import ValidationError

from components.digest import digest
from components.evaluation.metrics import Hypothesis, main_metric, score
from components.evaluation.normalise import NORMALISATION, is_unspaced, normalise
from components.registry.records import LINEAGE, Link, Record
from components.schema import Strict
from infra import storage

EVALUATION = "evaluation.json"
METRICS = {"wer": "lower", "cer": "lower", "accuracy": "higher", "choice": "higher"}  # which of two values is better


class Answers(Strict):
    """A task on a split, clip by clip. Metrics that are defined for it are the keys of `counts`.

    `counts` are errors, or 1 for a right answer; `lengths` the words or characters of the references (1 for each clip
    where right answers are counted); `before` the counts of the untrained model, None where it was not asked.
    """

    task: str
    split: str
    clips: int
    digest: str  # of the clips' keys, languages and normalised references
    lengths: dict[str, tuple[int, ...]]
    counts: dict[str, tuple[int, ...]]
    before: dict[str, tuple[int | None, ...]]

    def rate(self, metric: str) -> float:
        return sum(self.counts[metric]) / sum(self.lengths[metric])


class Evaluation(Strict):
    """The whole of an evaluation; `main` is the metric that a model is judged by, such as `asr/test/wer`."""

    schema_version: int = 1
    data: Link
    normalisation: str
    main: str
    answers: tuple[Answers, ...]

    def find(self, metric: str) -> tuple[Answers, str]:
        """The answers behind `task/split/metric`, and the last of these words. LookupError says what there is."""
        words = metric.rsplit("/", 2)
        for answers in self.answers:
            if [answers.task, answers.split] == words[:2] and words[2] in answers.counts:
                return answers, words[2]
        raise LookupError(f"no {metric} was measured; there are: {', '.join(self.metrics())}")

    def metrics(self) -> list[str]:
        return [f"{answers.task}/{answers.split}/{name}" for answers in self.answers for name in answers.counts]


def evaluation_record(data: Link, hypotheses: Sequence[Hypothesis]) -> Evaluation:
    """The record of these answers to clips of `data`. ValueError if there are none, or nothing can be counted."""
    groups: dict[tuple[str, str], list[Hypothesis]] = {}
    for one in hypotheses:
        groups.setdefault((one.task, one.split), []).append(one)
    main = main_metric(score(hypotheses))[0]
    answers = tuple(_answers(task, split, rows) for (task, split), rows in groups.items())
    return Evaluation(data=data, normalisation=NORMALISATION, main=main, answers=answers)


def read_evaluation(folder: str) -> Evaluation | None:
    """The record of a model's folder; of one that was registered before there were such records it is made from the
    run that the folder lies in. None if neither is there. ValueError if it is of another form.
    """
    url = storage.join(folder, EVALUATION)
    try:
        return Evaluation.model_validate(storage.read_json(url))
    except FileNotFoundError:
        pass
    except ValidationError as error:
        raise ValueError(f"{url} is of another version of this code: register the model again") from error
    run = folder.rstrip("/").removesuffix("/model")
    answers = storage.join(run, "evaluation/hypotheses.jsonl")
    if run == folder.rstrip("/") or not storage.exists(answers):
        return None
    lines = storage.read_text(answers).splitlines()
    data = Record.model_validate(storage.read_json(storage.join(run, LINEAGE))).data[0]
    return evaluation_record(data, [Hypothesis.model_validate_json(line) for line in lines])


def _answers(task: str, split: str, rows: list[Hypothesis]) -> Answers:
    rows = sorted(rows, key=lambda row: (row.key, row.reference))
    references = [normalise(row.reference, row.language) for row in rows]
    asked = [i for i, row in enumerate(rows) if row.before is not None]
    counts = _counts(rows, references, [row.hypothesis for row in rows])
    if all(row.choice is not None for row in rows):
        right = (normalise(row.choice or "", row.language) == r for row, r in zip(rows, references, strict=True))
        counts["choice"] = [int(equal) for equal in right]
    before: dict[str, tuple[int | None, ...]] = {}
    if asked:
        old = _counts([rows[i] for i in asked], [references[i] for i in asked], [rows[i].before or "" for i in asked])
        for metric, values in old.items():
            at = dict(zip(asked, values, strict=True))
            before[metric] = tuple(at.get(i) for i in range(len(rows)))
    lengths = {metric: [1] * len(rows) for metric in counts} | {
        "wer": [0 if is_unspaced(row.language) else len(r.split()) for row, r in zip(rows, references, strict=True)],
        "cer": [len(reference) for reference in references],
    }
    defined = [metric for metric in counts if sum(lengths[metric])]
    return Answers(
        task=task,
        split=split,
        clips=len(rows),
        digest=digest([[row.key, row.language, text] for row, text in zip(rows, references, strict=True)]),
        lengths={metric: tuple(lengths[metric]) for metric in defined},
        counts={metric: tuple(counts[metric]) for metric in defined},
        before={metric: before[metric] for metric in defined if metric in before},
    )


def _counts(rows: Sequence[Hypothesis], references: list[str], answers: list[str]) -> dict[str, list[int]]:
    """Errors in words and in characters and right answers, of each clip; as components/evaluation/metrics.py counts."""
    said = [normalise(answer, row.language) for row, answer in zip(rows, answers, strict=True)]
    words = _edits(jiwer.process_words(references, said).alignments)
    return {
        "wer": [0 if is_unspaced(row.language) else edits for row, edits in zip(rows, words, strict=True)],
        "cer": _edits(jiwer.process_characters(references, said).alignments),
        "accuracy": [int(reference == answer) for reference, answer in zip(references, said, strict=True)],
    }


def _edits(alignments: Sequence[Sequence[jiwer.AlignmentChunk]]) -> list[int]:
    return [
        sum(max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
        for chunks in alignments
    ]
