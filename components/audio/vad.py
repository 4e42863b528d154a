"""Where somebody speaks: Silero VAD (version 5, 2.3 MB, MIT), run by ONNX-runtime on one thread.

The network looks at 512 samples (32 ms) at 16 kHz, with the last 64 of the window before in front of them, and carries
a state from window to window. The file comes in the wheel `pipecat-ai` and is found without importing that package;
how spans are made of probabilities follows get_speech_timestamps of github.com/snakers4/silero-vad.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from components.schema import SAMPLE_RATE
from models.weights.files import Source, file_sha256, locate

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MODEL = Source(
    "pipecat",
    "audio/vad/data/silero_vad.onnx",
    "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
)
REMEDY = "pip install --no-deps pipecat-ai==1.14.0"
WINDOW = 512  # samples of one probability: 32 ms
CONTEXT = 64  # samples of the window before
STATE = 128
BATCH = 32  # clips that go through the network together


class Span(NamedTuple):
    """A stretch of a recording in seconds."""

    start: float
    end: float


def check_model() -> None:
    """Raise FileNotFoundError or ValueError if the model is not installed, or is another one: before work begins."""
    _session()


def speech_probabilities(samples: np.ndarray) -> np.ndarray:
    """(windows,) float32: how likely it is that somebody speaks in each WINDOW of (samples,) float32 at SAMPLE_RATE.

    The last window is filled up with zeros. Raises ValueError if the samples are not one row of finite numbers or the
    model is not the expected one, FileNotFoundError if it is not installed.
    """
    return batch_probabilities([samples])[0]


def batch_probabilities(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`speech_probabilities` of each clip, of any lengths, BATCH of them at a time; the order of the clips is kept."""
    for samples in clips:
        if samples.ndim != 1:
            raise ValueError(f"samples must be mono, shape (samples,), not {samples.shape}; mix the channels first")
        if not np.isfinite(samples.sum(dtype=np.float64)):
            raise ValueError("samples hold NaN or infinite values; pass them through components.audio.decode first")
    order = sorted(range(len(clips)), key=lambda number: -len(clips[number]))  # longest first: a step's rows lead
    found = [np.zeros(0, np.float32)] * len(clips)
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        for number, row in zip(group, _run([clips[number] for number in group]), strict=True):
            found[number] = row
    return found


def speech_spans(
    probabilities: np.ndarray,
    seconds: float | None = None,
    onset: float = 0.5,
    offset: float | None = None,
    min_speech: float = 0.25,
    min_silence: float = 0.1,
    pad: float = 0.03,
) -> list[Span]:
    """Stretches of speech of (windows,) probabilities, in order and without overlap.

    Speech begins at a probability of `onset` and ends where it stays under `offset` (onset - 0.15) for `min_silence`
    seconds. What lasts `min_speech` seconds or less is dropped, the rest widened by `pad` seconds on both sides, or by
    half the gap between two. `seconds` is the length of the recording, if it ends inside the last window; ValueError is
    raised if it belongs to another number of windows.
    """
    samples = len(probabilities) * WINDOW if seconds is None else round(seconds * SAMPLE_RATE)
    if -(-samples // WINDOW) != len(probabilities):
        raise ValueError(f"{len(probabilities)} windows are not those of a recording of {seconds:g} s; pass its length")
    offset = max(onset - 0.15, 0.01) if offset is None else offset
    found = _regions(probabilities, samples, onset, offset, min_silence * SAMPLE_RATE)
    regions = [(start, end) for start, end in found if end - start > min_speech * SAMPLE_RATE]
    margin = pad * SAMPLE_RATE
    spans: list[Span] = []
    for number, (start, end) in enumerate(regions):
        before = start - regions[number - 1][1] if number else 2 * start
        after = regions[number + 1][0] - end if number + 1 < len(regions) else 2 * (samples - end)
        begin, stop = start - min(margin, before / 2), end + min(margin, after / 2)
        spans.append(Span(begin / SAMPLE_RATE, stop / SAMPLE_RATE))
    return spans


def _regions(
    probabilities: np.ndarray, samples: int, onset: float, offset: float, min_silence: float
) -> list[tuple[int, int]]:
    """First sample and one after the last of every stretch between an onset and the silence that ends it."""
    regions: list[tuple[int, int]] = []
    start: int | None = None
    falls: int | None = None  # since when the probability has been low
    for now, probability in zip(range(0, samples, WINDOW), probabilities.tolist(), strict=True):
        if probability >= onset:
            falls = None
            start = now if start is None else start
        elif probability < offset and start is not None:
            falls = now if falls is None else falls
            if now - falls >= min_silence:
                regions.append((start, falls))
                start = falls = None
    if start is not None:
        regions.append((start, samples))
    return regions


def _run(clips: list[np.ndarray]) -> list[np.ndarray]:
    """Probabilities of at most BATCH clips, the longest first; a clip leaves the batch where it ends."""
    counts = [-(-len(samples) // WINDOW) for samples in clips]
    padded = [np.zeros(CONTEXT + WINDOW * count, np.float32) for count in counts]
    for row, samples in zip(padded, clips, strict=True):
        row[CONTEXT : CONTEXT + len(samples)] = samples
    found = [np.empty(count, np.float32) for count in counts]
    if not counts or not counts[0]:
        return found
    session = _session()
    rate = np.array(SAMPLE_RATE, np.int64)
    state = np.zeros((2, len(clips), STATE), np.float32)
    active = len(clips)
    for step in range(counts[0]):
        while counts[active - 1] <= step:
            active -= 1
        at = step * WINDOW
        windows = np.stack([row[at : at + CONTEXT + WINDOW] for row in padded[:active]])
        values, state = session.run(None, {"input": windows, "state": state[:, :active], "sr": rate})
        for row, value in zip(found, values[:, 0].tolist(), strict=False):
            row[step] = value
    return found


@cache
def _session() -> InferenceSession:
    """The network, loaded and checked once in a process."""
    path = locate(MODEL)
    if path is None:
        raise FileNotFoundError(f"speech detection needs {MODEL.path} of {MODEL.package}; get it with: {REMEDY}")
    if file_sha256(path) != MODEL.sha256:
        raise ValueError(f"{path} is not the file that was tested here; get it with: {REMEDY}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
