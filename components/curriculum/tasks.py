"""Tasks: how a record becomes chat messages, and what the right answer is.

A recipe names tasks with weights. `asr`, `biased_asr`, `tts`, `units`, `chain`, `caption`, `conversation` and `intent`
read one field of the record; `label:<name>` and `translate:<language>` one entry of it (`label:gender` also the
speaker's), `labels` and `translation` every entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from components.curriculum.wordings import LANGUAGES, tags, wording

Message = dict[str, Any]
Row = dict[str, Any]

GENERIC = (
    *("asr", "biased_asr", "tts", "units", "chain", "caption", "conversation", "intent"),
    *("labels", "translation"),
)
BIAS_WORDS = 3  # of the clip's own in the list of biased_asr, and as many of each other clip


@dataclass(frozen=True)
class TaskSample:
    """One record seen as one task: the conversation with its answer, and the answer as text.

    `keys` are the clips of the conversation's turns, in their order; the last one is the record's own.
    """

    keys: tuple[str, ...]
    task: str
    messages: tuple[Message, ...]
    reference: str

    @property
    def key(self) -> str:
        return self.keys[-1]

    def prompt(self) -> list[Message]:
        """The conversation up to the answer."""
        return list(self.messages[:-1])


def samples_of(row: Row, task: str, phrasings: int = 1, others: Sequence[Row] = ()) -> list[TaskSample]:
    """The samples that an index row gives for a task; none if it has no such field.

    phrasings: how many wordings of a request are used; which one a record gets is drawn from its key. 0: tags. others:
    records that the conversation shows first, each as a turn with its answer (`biased_asr`: whose words it mixes in).
    Raises ValueError for a task that does not exist.
    """
    name, _, entry = task.partition(":")
    if task in ("labels", "translation"):
        singular = "label" if task == "labels" else "translate"
        entries = (row["labels"] or {}) if task == "labels" else (row["translation"] or {})
        return [s for each in sorted(entries) for s in samples_of(row, f"{singular}:{each}", phrasings, others)]
    if name == "label" and entry:
        value = (row["labels"] or {}).get(entry)
        if value is None and entry == "gender":
            value = row.get("gender")
        usable = isinstance(value, (str, int, float)) and not isinstance(value, bool)
        return [_ask(row, task, phrasings, str(value), others, name=entry)] if usable else []
    if name == "translate" and entry:
        value = (row["translation"] or {}).get(entry)
        named = {"name": LANGUAGES.get(entry, entry), "to": entry}
        return [_ask(row, task, phrasings, value, others, **named)] if value else []
    if task not in GENERIC:
        raise ValueError(f"no task {task!r}; tasks are: {', '.join(GENERIC)}, label:<name>, translate:<language>")
    return _generic(row, task, phrasings, others)


def _generic(row: Row, task: str, phrasings: int, others: Sequence[Row]) -> list[TaskSample]:
    text, keys = row["text"], (row["key"],)
    audio = {"type": "audio"}
    if task == "units":
        return [TaskSample(keys, task, ({"role": "assistant", "content": [audio]},), "")]
    if task == "caption":
        return [_ask(row, task, phrasings, row["caption"], others)] if row["caption"] else []
    if task == "conversation":
        messages = row.get("conversations")
        return [TaskSample(keys, task, tuple(messages), _words(messages[-1]))] if messages else []
    if task == "intent":
        meant = spoken_intent(row)
        return [_ask(row, task, phrasings, meant, others)] if meant else []
    if not text:
        return []
    if task == "asr":
        return [_ask(row, task, phrasings, text, others)]
    if task == "biased_asr":
        return [_ask(row, task, phrasings, text, words=", ".join(bias_list(row, others)))]
    if task == "tts":
        asked = [
            {"type": "text", "text": wording("tts", row["key"], max(1, phrasings))},
            {"type": "transcript", "text": text},
        ]
        return [
            TaskSample(keys, task, ({"role": "user", "content": asked}, {"role": "assistant", "content": [audio]}), "")
        ]
    messages = row.get("conversations")
    if not messages:
        return []
    answer = _words(messages[-1])
    chained = [{"type": "transcript", "text": text}, {"type": "text", "text": answer}]
    return [
        TaskSample(
            keys, task, ({"role": "user", "content": [audio]}, {"role": "assistant", "content": chained}), answer
        )
    ]


def bias_list(row: Row, others: Sequence[Row]) -> list[str]:
    """Longest words of a clip's own text among those of other clips, in alphabetical order: contextual biasing."""
    chosen: list[str] = []
    for each in (row, *others):
        words = sorted(set((each["text"] or "").split()), key=lambda word: (-len(word), word))
        chosen += words[:BIAS_WORDS]
    return sorted(set(chosen))


def spoken_intent(row: Row) -> str | None:
    """What an order means, as text: the intent, and its slots in alphabetical order. None if it is not labelled."""
    labels = row["labels"] or {}
    intent, slots = labels.get("intent"), labels.get("slots")
    if not isinstance(intent, str):
        return None
    named = sorted(slots.items()) if isinstance(slots, dict) else []
    return "; ".join([intent, *(f"{name} {str(value).strip()}" for name, value in named)])


def select(rows: Iterable[Row], tasks: dict[str, float]) -> list[TaskSample]:
    """All samples of the tasks, in the order of the rows."""
    return [sample for row in rows for task in tasks for sample in samples_of(row, task)]


def generic_name(task: str) -> str:
    """The name under which a recipe may weigh a task: `label:emotion` also answers to `labels`."""
    name = task.partition(":")[0]
    return {"label": "labels", "translate": "translation"}.get(name, name)


def question(text: str | None = None, task: str = "asr") -> list[Message]:
    """A prompt about a clip in a person's own words, or in the task's."""
    return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text or wording(task)}]}]


def _ask(row: Row, task: str, phrasings: int, answer: str, others: Sequence[Row] = (), **names: str) -> TaskSample:
    """The record's own turn, behind one turn for each of the others, all in the wording that the record drew."""
    name = task.partition(":")[0]
    request = wording(name, row["key"], phrasings, **names) if phrasings else tags(name, row.get("language"), **names)
    messages: list[Message] = []
    keys: list[str] = []
    for other in others:
        shown = samples_of(other, task)[0]
        messages += [*question(request), shown.messages[-1]]
        keys.append(shown.key)
    messages += [*question(request), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return TaskSample((*keys, row["key"]), task, tuple(messages), answer)


def _words(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
