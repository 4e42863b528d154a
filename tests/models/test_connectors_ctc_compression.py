"""CTC compression against a loop over clips and frames."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.connectors.ctc_compression import Method, average, blank_probability, blank_removal, compress

CLIP = st.lists(st.integers(0, 3), min_size=1, max_size=9)
METHODS: tuple[Method, ...] = ("average", "blank_removal", "blank_probability")


def log_probs_of(labels: list[list[int]], seed: int = 0) -> Tensor:
    """Log-probabilities whose best labels are these; noise behind the ends."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(len(labels), max(map(len, labels)), 4, generator=generator)
    for row, clip in zip(logits, labels, strict=True):
        row[range(len(clip)), clip] += 1.0
    return logits.log_softmax(-1)


def naive(frames: Tensor, log_probs: Tensor, labels: list[int], method: Method, blank: int, threshold: float) -> Tensor:
    """One clip without padding, frame by frame."""
    if method == "average":
        runs = [[at for at, _ in run] for _, run in groupby(enumerate(labels), key=lambda pair: pair[1])]
        return torch.stack([torch.stack([frames[at] for at in run]).mean(0) for run in runs])
    blankness = [float(log_probs[at, blank].exp()) for at in range(len(labels))]
    if method == "blank_removal":
        kept = [at for at, label in enumerate(labels) if label != blank]
    else:
        kept = [at for at, value in enumerate(blankness) if value < threshold]
    return torch.stack([frames[at] for at in kept or [blankness.index(min(blankness))]])


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(CLIP, min_size=1, max_size=4),
    blank=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.2, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("method", METHODS)
def test_compression_is_what_a_loop_gives(
    method: Method, labels: list[list[int]], blank: int, threshold: float, seed: int
) -> None:
    log_probs = log_probs_of(labels, seed)
    frames = torch.randn(len(labels), log_probs.shape[1], 3, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([len(clip) for clip in labels])
    compressed, counts = compress(frames, lengths, log_probs, method, blank, threshold)
    expected = [
        naive(f, p, clip, method, blank, threshold) for f, p, clip in zip(frames, log_probs, labels, strict=True)
    ]
    assert counts.tolist() == [len(clip) for clip in expected]
    assert compressed.shape[1] == max(counts.tolist())
    assert torch.allclose(compressed, torch.nn.utils.rnn.pad_sequence(expected, batch_first=True), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_lies_behind_a_clips_end_joins_no_group(method: Method) -> None:
    labels = [[1, 1, 0, 2, 2, 2], [3, 0, 0]]
    log_probs = log_probs_of(labels)
    frames, lengths = torch.randn(2, 6, 3), torch.tensor([6, 3])
    before = compress(frames, lengths, log_probs, method, 0, 0.3)
    frames[1, 3:] = float("nan")
    log_probs[1, 3:] = float("nan")
    after = compress(frames, lengths, log_probs, method, 0, 0.3)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_runs_of_blanks_are_averaged_too_and_dropped_by_removal() -> None:
    log_probs = log_probs_of([[0, 0, 1, 1, 1, 0]])
    frames = torch.tensor([[[1.0], [3.0], [4.0], [5.0], [9.0], [7.0]]])
    lengths = torch.tensor([6])
    assert average(frames, lengths, log_probs)[0].flatten().tolist() == [2.0, 6.0, 7.0]
    assert blank_removal(frames, lengths, log_probs)[0].flatten().tolist() == [4.0, 5.0, 9.0]


def test_a_clip_of_blanks_keeps_the_frame_that_is_least_so() -> None:
    probabilities = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]], [[0.7, 0.3], [0.9, 0.1], [0.0, 1.0]]])
    frames, lengths = torch.arange(6.0).view(2, 3, 1), torch.tensor([3, 2])
    for compressed, counts in (
        blank_removal(frames, lengths, probabilities.log()),
        blank_probability(frames, lengths, probabilities.log(), blank=0, threshold=0.1),
    ):
        assert counts.tolist() == [1, 1]
        assert compressed.flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("method", "gradient"),
    [("average", [0.5, 0.5, 1, 0.5, 0.5, 0]), ("blank_removal", [1, 1, 0, 1, 1, 0]), ("blank_probability", None)],
)
def test_gradients_flow_to_the_frames_that_are_kept(method: Method, gradient: list[float] | None) -> None:
    log_probs = log_probs_of([[1, 1, 0, 2, 2, 3]])
    frames = torch.randn(1, 6, 2, requires_grad=True)
    compressed, counts = compress(frames, torch.tensor([5]), log_probs, method, 0, 0.3)
    compressed.sum().backward()
    assert frames.grad is not None
    assert float(frames.grad.sum()) == pytest.approx(2 * int(counts))
    if gradient is not None:
        assert frames.grad[0, :, 0].tolist() == pytest.approx(gradient)


def test_an_unknown_method_is_refused() -> None:
    method: Any = "softmax"
    with pytest.raises(ValueError, match="average, blank_removal or blank_probability"):
        compress(torch.randn(1, 2, 3), torch.tensor([2]), torch.randn(1, 2, 4), method)
