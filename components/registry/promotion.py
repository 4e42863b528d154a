"""Whether a model may take the place of another: better by a declared margin on the same clips of the same data."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from components.registry.evaluation_record import METRICS, Answers, Evaluation

DRAWS = 1000  # resamples of the clips behind an interval
AT_ONCE = 4_000_000  # numbers of them in memory


class NotComparable(ValueError):
    """Two models were not measured on the same; the message says what to do."""


class Verdict(NamedTuple):
    """How a model compares. Rates are shares of 1, gains are positive where it is the better one."""

    passed: bool
    metric: str
    value: float
    other: float
    gain: float
    needed: float
    interval: tuple[float, float] | None  # 95 %, of the gain
    clips: int
    against: str  # "version 2", "the untrained model"

    def said(self) -> str:
        """One line."""
        line = f"{self.metric} {self.value:.2%} against {self.other:.2%} of {self.against}"
        change = f"{'better' if self.gain > 0 else 'worse'} by {_points(abs(self.gain))}" if self.gain else "no better"
        if self.passed:
            verdict = f"{change}, {_points(self.needed)} needed" if self.needed else change
        elif self.needed:
            short = _points(self.needed - self.gain)
            verdict = f"{change}, but {_points(self.needed)} better is needed: it falls short by {short}"
        else:
            verdict = f"{change}, and it has to be better" + (
                f": it falls short by {_points(-self.gain)}" if self.gain else ""
            )
        return f"{line}: {verdict}"

    def certainty(self) -> str:
        """What chance has to do with it, in one line. The margin decides, this only tells."""
        if self.interval is None:
            return f"{self.clips} clip{'s' if self.clips != 1 else ''}: too few to say how much of this is chance"
        low, high = self.interval
        sure = "" if low > 0 or high < 0 else "; zero is in it, so this may be chance"
        return (
            f"95 % interval of the gain: {100 * low:+.2f} to {100 * high:+.2f} points "
            f"(paired bootstrap over {self.clips} clips){sure}"
        )


def compare(
    candidate: Evaluation,
    incumbent: Evaluation | None,
    metric: str | None = None,
    margin: float = 0.0,
    relative: bool = False,
    against: str = "the incumbent",
) -> Verdict:
    """The candidate beside the incumbent, or without one beside its own untrained self, which it only has to beat.

    `metric` is `task/split/name`, by default the candidate's main one; `margin` a difference of rates (0.005 = half a
    point), or with `relative` a share of the incumbent's rate. NotComparable if they were not measured on the same;
    LookupError for a metric that was not measured; ValueError for an impossible margin.
    """
    if not (math.isfinite(margin) and 0 <= margin < 1):
        raise ValueError(
            f"--margin {margin} is impossible: give a share from 0 up to 1, such as 0.005 for half a point"
        )
    metric = metric or candidate.main
    mine, name = candidate.find(metric)
    if incumbent is None:
        return _judged(metric, name, mine, _untrained(mine, name), 0.0, False, "the untrained model")
    theirs = _same(candidate, incumbent, mine, metric, against)
    return _judged(metric, name, mine, theirs.counts[name], margin, relative, against)


def _judged(
    metric: str,
    name: str,
    mine: Answers,
    counts: tuple[int | None, ...],
    margin: float,
    relative: bool,
    against: str,
) -> Verdict:
    """The verdict over the clips that both answered."""
    there = np.array([count is not None for count in counts])
    lengths = np.array(mine.lengths[name])[there]
    ours = np.array(mine.counts[name])[there]
    theirs = np.array([count for count in counts if count is not None])
    if not lengths.sum():
        raise NotComparable(f"{metric} is undefined: no clip that both answered has a reference")
    value, other = float(ours.sum() / lengths.sum()), float(theirs.sum() / lengths.sum())
    sign = -1 if METRICS[name] == "lower" else 1
    gain = sign * (value - other)
    needed = margin * other if relative else margin
    passed = gain > 0 and gain >= needed - 1e-12  # what rounding takes away is not held against it
    interval = _interval(sign * (ours - theirs), lengths)
    return Verdict(passed, metric, value, other, gain, needed, interval, len(lengths), against)


def _untrained(mine: Answers, name: str) -> tuple[int | None, ...]:
    if name not in mine.before:
        raise NotComparable(
            f"the untrained model's {name} of {mine.task} was not measured, so there is nothing to beat: "
            "name another --metric, or promote with --force and --why"
        )
    return mine.before[name]


def _same(candidate: Evaluation, incumbent: Evaluation, mine: Answers, metric: str, against: str) -> Answers:
    """The incumbent's answers to the same clips. NotComparable otherwise."""
    ours, theirs = candidate.data, incumbent.data
    if ours.digest != theirs.digest:
        raise NotComparable(
            f"the candidate was measured on {ours.dataset}/{ours.version} ({ours.digest[:12]}), {against} on "
            f"{theirs.dataset}/{theirs.version} ({theirs.digest[:12]}): run the chain of one with the --data of the "
            "other (`earloom run --arch … --data …`) and promote what that registers"
        )
    if candidate.normalisation != incumbent.normalisation:
        raise NotComparable(
            f"the texts of {against} were normalised in another way before they were compared: evaluate and register "
            "both with the same version of this code"
        )
    settings = "evaluate and register both with the same split=, eval_task= and eval_clips="
    try:
        found = incumbent.find(metric)[0]
    except LookupError as error:
        raise NotComparable(f"{against} cannot be compared, {error.args[0]}: {settings}") from None
    if found.clips != mine.clips:
        raise NotComparable(f"the candidate answered {mine.clips} clips, {against} {found.clips}: {settings}")
    if found.digest != mine.digest:
        raise NotComparable(f"the candidate and {against} answered other clips of {metric}: {settings}")
    return found


def _interval(gains: np.ndarray, lengths: np.ndarray) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the difference of rates, both models on the same draws of clips, seed 0.

    Source: Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance evaluation, ICASSP 2004.
    """
    clips = len(lengths)
    if clips < 2:
        return None
    random, rates = np.random.default_rng(0), []
    rows = max(1, AT_ONCE // clips)
    for start in range(0, DRAWS, rows):
        draws = random.multinomial(clips, [1 / clips] * clips, size=min(rows, DRAWS - start))
        totals = draws @ lengths
        rates.append((draws @ gains)[totals > 0] / totals[totals > 0])
    low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
    return float(low), float(high)


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"
