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


TAGGED = ("en", "zh", "de", "es", "ko", "fr", "ja", "it")  # languages that have a tag
KEYWORDS = {"emotion": "emotion_recognition", "scene": "scene", "class": "scene", "event": "event"}
ANALYSIS = "<|startofanalysis|><|{spoken}|>"
TAGS = {
    "asr": "<|startoftranscript|><|{spoken}|><|transcribe|><|{spoken}|><|notimestamps|><|wo_itn|>",
    "translate": "<|startoftranscript|><|{spoken}|><|translate|><|{to}|><|notimestamps|><|itn|>",
    "caption": "<|startofanalysis|><|unknown|><|caption|><|en|><|notimestamps|><|caption_plain|>",
}


def wording(task: str, key: str = "", count: int = 1, **names: str) -> str:
    """One of the first `count` wordings of a task, drawn from a clip's key; `names` fill its slots."""
    wordings = WORDINGS[task][:count]
    drawn = int.from_bytes(hashlib.sha256(f"{task}/{key}".encode()).digest()[:4], "big") % len(wordings)
    return wordings[drawn].format(**names)


def tags(task: str, spoken: str | None, to: str = "", **names: str) -> str:
    """A task as Qwen-Audio's hierarchical tags (arXiv 2311.07919, section 3.2; QwenLM/Qwen-Audio, eval_audio/).

    Tasks without tags of their own are questions. `spoken` and `to` are language codes.
    """
    languages = {"spoken": _tag(spoken), "to": _tag(to)}
    if task in TAGS and languages["to" if task == "translate" else "spoken"] != "unknown":
        return TAGS[task].format(**languages)
    if task == "label" and names["name"] in KEYWORDS:
        keyword = KEYWORDS[names["name"]]
        return ANALYSIS.format(**languages) + f"<|keyword|><|en|><|notimestamps|><|{keyword}|>"
    asked = wording(task, "", 1, **names)
    return ANALYSIS.format(spoken="en") + f"<|question|>{asked}<|answer|>"


def _tag(language: str | None) -> str:
    return language if language in TAGGED else "unknown"
