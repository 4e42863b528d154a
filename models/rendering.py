"""From chat messages to a token sequence: what the backbone reads, and on which tokens it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss (the index that torch's cross entropy leaves out)

Message = dict[str, Any]


@dataclass(frozen=True)
class Audio:
    """One clip as a model takes it: continuous features per encoder role, discrete units, or the waveform itself.

    `features[role]` is `(frames, width)`; `units` is `(frames,)`, one cluster a frame, repetitions included. A stage
    that trains an encoder gets `waveform`, `(samples,)` at 16 kHz, and in `counts` the frames that each role will make
    of it.
    """

    features: dict[str, Tensor] = field(default_factory=dict)
    units: Tensor | None = None
    waveform: Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def frames(self) -> dict[str, int]:
        if self.units is not None:
            return {"units": len(self.units)}
        return self.counts or {role: len(frames) for role, frames in self.features.items()}


@dataclass
class Rendered:
    """A token sequence: ids, labels (`IGNORED` where nothing is learnt) and the positions that audio fills.

    clip_at, clip_tokens: where each clip begins and how many positions it has (none if the backbone hears it another
    way). A sequence uses the first `len(clip_at)` clips of its conversation. instruction: ids of the request alone,
    for systems that read it apart from the sequence.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    audio_at: list[int] = field(default_factory=list)
    clip_at: list[int] = field(default_factory=list)
    clip_tokens: list[int] = field(default_factory=list)
    instruction: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, ids: list[int], learn: bool = False) -> Rendered:
        self.ids += ids
        self.labels += ids if learn else [IGNORED] * len(ids)
        return self

    def text(self, tokenizer: PreTrainedTokenizerBase, text: str, learn: bool = False) -> Rendered:
        """Append `text`, tokenised on its own and without special tokens."""
        return self.tokens(tokenizer(text, add_special_tokens=False)["input_ids"], learn)

    def audio(self, count: int, filler: int) -> Rendered:
        """Append the next clip as `count` positions whose embeddings the connector gives; `filler` is any valid id.

        Of no positions: the clip belongs here, and the backbone hears it by other means than its sequence.
        """
        self.clip_at.append(len(self.ids))
        self.clip_tokens.append(count)
        self.audio_at += range(len(self.ids), len(self.ids) + count)
        return self.tokens([filler] * count)


@dataclass(frozen=True)
class Turn:
    """A request and its answer (None where the model is asked to write it); `clips`: how many recordings it brings."""

    request: str
    answer: str | None
    clips: int


def turns(messages: list[Message]) -> list[Turn]:
    """A conversation as pairs of request and answer; a request without an answer can only be the last."""
    found: list[Turn] = []
    for message in messages:
        if message["role"] == "user":
            found.append(Turn(_text_of(message), None, _clips_in(message)))
        elif message["role"] == "assistant":
            found[-1] = Turn(found[-1].request, _text_of(message), found[-1].clips)
    return found


def user_text(messages: list[Message]) -> str:
    """The text of the last user turn."""
    return _text_of([message for message in messages if message["role"] == "user"][-1])


def answer_text(messages: list[Message]) -> str | None:
    """The text of the assistant turn that is to be learnt; None when the model is asked to write it."""
    return _text_of(messages[-1]) if messages[-1]["role"] == "assistant" else None


def transcript_text(message: Message) -> str | None:
    """What a turn says is spoken: the words of a chain-of-modality answer, or the text to be voiced."""
    if isinstance(message["content"], str):
        return None
    return next((part["text"] for part in message["content"] if part["type"] == "transcript"), None)


def has_audio(message: Message) -> bool:
    return _clips_in(message) > 0


def _clips_in(message: Message) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "audio" for part in content)


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
