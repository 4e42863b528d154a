"""eSpeak NG in a child process: the same samples on every call, and errors that say what to do."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from components.corpus.espeak import SAMPLE_RATE, Utterance, speak

LIST = [
    Utterance("turn on the kitchen light", "gmw/en-US+f2", speed=160),
    Utterance("turn on the kitchen light", "gmw/en-US+f2", speed=160),
    Utterance("call my brother", "gmw/en-GB-scotland+m3", pitch=60),
]


def test_the_same_list_gives_the_same_samples() -> None:
    pytest.importorskip("espeakng_loader")
    first, second = list(speak(LIST)), list(speak(LIST))
    assert [len(samples) for samples in first] == [len(samples) for samples in second]
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_speed_and_volume() -> None:
    pytest.importorskip("espeakng_loader")
    slow, fast = speak([Utterance(LIST[0].text, "gmw/en-US", speed=speed) for speed in (120, 240)])
    assert slow.dtype == np.int16
    assert 1.5 * len(fast) < len(slow)
    assert 0.5 < len(fast) / SAMPLE_RATE < 1.5
    assert 5_000 < np.abs(slow.astype(int)).max() < 32_767


def test_an_unknown_voice_is_named() -> None:
    pytest.importorskip("espeakng_loader")
    spoken = speak([LIST[0], Utterance("hello", "gmw/en-XX")])
    assert len(next(spoken)) > 0
    with pytest.raises(RuntimeError, match=r"utterance 2 of 2.*no voice 'gmw/en-XX'.*pip install"):
        next(spoken)


def test_a_caller_may_stop_listening() -> None:
    pytest.importorskip("espeakng_loader")
    spoken = speak(LIST * 50)
    next(spoken)
    spoken.close()


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str, *rest: Any) -> None:
        assert name == "espeakng_loader"

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(RuntimeError, match="pip install 'espeakng-loader"):
        next(speak(LIST))
