"""Tasks: how a record becomes chat messages, and what the right answer is.

A recipe names tasks with weights. `asr`, `tts`, `units`, `chain`, `caption`, `conversation` read one field of the
record; `label:<name>` and `translate:<language>` one entry of it, `labels` and `translation` every entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

INSTRUCTIONS = {
    "asr": "Transcribe speech to text.",
    "tts": "Read this out loud.",
    "caption": "Describe the audio in one sentence.",
    "label": "What is the {name} in this audio?",
    "translate": "Translate the speech into {name}.",
}
LANGUAGES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "ru": "Russian",
    "zh": "Chinese",
}
GENERIC = ("asr", "tts", "units", "chain", "caption", "conversation", "labels", "translation")


@dataclass(frozen=True)
class TaskSample:
    """One record seen as one task: the conversation with its answer, and the answer as text."""

    key: str
    task: str
    messages: tuple[Message, ...]
    reference: str

    def prompt(self) -> list[Message]:
        """The conversation up to the answer."""
        return list(self.messages[:-1])


def samples_of(row: dict[str, Any], task: str) -> list[TaskSample]:
    """The samples that an index row gives for a task; none if it has no such field.

    Raises ValueError for a task that does not exist.
    """
    name, _, entry = task.partition(":")
    if task in ("labels", "translation"):
        singular = "label" if task == "labels" else "translate"
        entries = (row["labels"] or {}) if task == "labels" else (row["translation"] or {})
        return [sample for each in sorted(entries) for sample in samples_of(row, f"{singular}:{each}")]
    if name == "label" and entry:
        value = (row["labels"] or {}).get(entry)
        usable = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        return [_ask(row, task, INSTRUCTIONS["label"].format(name=entry), str(value))] if usable else []
    if name == "translate" and entry:
        value = (row["translation"] or {}).get(entry)
        return (
            [_ask(row, task, INSTRUCTIONS["translate"].format(name=LANGUAGES.get(entry, entry)), value)]
            if value
            else []
        )
    if task not in GENERIC:
        raise ValueError(f"no task {task!r}; tasks are: {', '.join(GENERIC)}, label:<name>, translate:<language>")
    return _generic(row, task)


def _generic(row: dict[str, Any], task: str) -> list[TaskSample]:
    text, key = row["text"], row["key"]
    audio = {"type": "audio"}
    if task == "units":
        return [TaskSample(key, task, ({"role": "assistant", "content": [audio]},), "")]
    if task == "caption":
        return [_ask(row, task, INSTRUCTIONS["caption"], row["caption"])] if row["caption"] else []
    if task == "conversation":
        messages = row.get("conversations")
        return [TaskSample(key, task, tuple(messages), _words(messages[-1]))] if messages else []
    if not text:
        return []
    if task == "asr":
        return [_ask(row, task, INSTRUCTIONS["asr"], text)]
    if task == "tts":
        asked = [{"type": "text", "text": INSTRUCTIONS["tts"]}, {"type": "transcript", "text": text}]
        return [
            TaskSample(key, task, ({"role": "user", "content": asked}, {"role": "assistant", "content": [audio]}), "")
        ]
    messages = row.get("conversations")
    if not messages:
        return []
    answer = _words(messages[-1])
    chained = [{"type": "transcript", "text": text}, {"type": "text", "text": answer}]
    return [
        TaskSample(key, task, ({"role": "user", "content": [audio]}, {"role": "assistant", "content": chained}), answer)
    ]


def select(rows: Iterable[dict[str, Any]], tasks: dict[str, float]) -> list[TaskSample]:
    """All samples of the tasks, in the order of the rows."""
    return [sample for row in rows for task in tasks for sample in samples_of(row, task)]


def generic_name(task: str) -> str:
    """The name under which a recipe may weigh a task: `label:emotion` also answers to `labels`."""
    name = task.partition(":")[0]
    return {"label": "labels", "translate": "translation"}.get(name, name)


def question(text: str | None = None, task: str = "asr") -> list[Message]:
    """A prompt about a clip in a person's own words, or in the task's."""
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text or INSTRUCTIONS[task]}]}]


def _ask(row: dict[str, Any], task: str, instruction: str, answer: str) -> TaskSample:
    user: Message = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": instruction}]}
    return TaskSample(
        row["key"], task, (user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}), answer
    )


def _words(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
