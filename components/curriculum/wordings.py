"""How a task is asked for in words. The first wording is the one that evaluation uses."""

from __future__ import annotations

import hashlib

WORDINGS: dict[str, tuple[str, ...]] = {
    "asr": (
        "Transcribe speech to text.",
        "Write down what is said.",
        "What are the words of this recording?",
        "Please give the transcript of the audio.",
    ),
    "biased_asr": (
        "These words may occur: {words}. Transcribe speech to text.",
        "Transcribe the speech. Some of these words may be in it: {words}.",
        "With this list in mind, write down what is said: {words}.",
        "Words to listen for: {words}. What is said?",
    ),
    "tts": ("Read this out loud.", "Say this.", "Speak the following words.", "Turn this text into speech."),
    "caption": (
        "Describe the audio in one sentence.",
        "What can be heard?",
        "Write a caption for this sound.",
        "Give a short description of what you hear.",
    ),
    "intent": (
        "What does the speaker want? Give the intent and its slots.",
        "Name the intent of this order and its details.",
        "Turn the spoken order into an intent with slots.",
        "What is being asked for? Answer with intent and slots.",
    ),
    "label": (
        "What is the {name} in this audio?",
        "Name the {name}.",
        "Listen and tell me the {name}.",
        "Which {name} do you hear?",
    ),
    "translate": (
        "Translate the speech into {name}.",
        "What does this mean in {name}?",
        "Give a {name} translation of what is said.",
        "Say it in {name}, as text.",
    ),
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


def wording(task: str, key: str = "", count: int = 1, **names: str) -> str:
    """One of the first `count` wordings of a task, drawn from a clip's key; `names` fill its slots."""
    wordings = WORDINGS[task][:count]
    drawn = int.from_bytes(hashlib.sha256(f"{task}/{key}".encode()).digest()[:4], "big") % len(wordings)
    return wordings[drawn].format(**names)
