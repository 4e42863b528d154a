"""The one normalisation that every reference and hypothesis goes through before it is compared.

It is stated in a sentence that the report prints, because an error rate means nothing without it. Whisper's
English normaliser is not used: its table of British and American spellings is not in the transformers package,
and it rewrites number words.
"""

from __future__ import annotations

import re
import unicodedata

NORMALISATION = (
    "Unicode NFKC, lower case, invisible characters dropped, punctuation and symbols replaced by a space "
    "(apostrophes kept inside words), white space collapsed; accents, digits and number words are left as they are; "
    "in English the titles Mr., Mrs. and Dr. are written out."
)
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my", "bo"})  # written without spaces: counted in characters

_APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\uff07": "'", "`": "'", "\u00b4": "'"})
_ENGLISH_TITLES = {"mr": "mister", "mrs": "missus", "dr": "doctor"}


def base_language(language: str | None) -> str:
    """`zh-TW` or `zh_Hant` → `zh`; nothing stated → an empty string."""
    return re.split(r"[-_]", language.strip().lower())[0] if language else ""


def is_unspaced(language: str | None) -> bool:
    """Whether a language writes words without spaces, so that only its character error rate means something."""
    return base_language(language) in UNSPACED


def normalise(text: str, language: str | None = None) -> str:
    """What `NORMALISATION` says; applying it twice changes nothing. For unspaced languages all spaces go."""
    # Before NFKC, which would turn a spacing acute accent (used as an apostrophe) into a space and a combining mark.
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    text = unicodedata.normalize("NFKC", text).translate(_APOSTROPHES)
    text = "".join(_kept(character) for character in text)
    text = re.sub(r"(?<![^\s'])'|'(?![^\s'])", " ", text)  # an apostrophe with nothing on one side is a quotation mark
    words = text.split()
    if base_language(language) == "en":
        words = [_ENGLISH_TITLES.get(word, word) for word in words]
    return ("" if is_unspaced(language) else " ").join(words)


def _kept(character: str) -> str:
    """Letters, marks, digits and apostrophes as they are; format characters vanish; the rest becomes a space."""
    if character == "'":
        return character
    category = unicodedata.category(character)
    if category == "Cf":  # soft hyphen, zero-width joiner, direction marks
        return ""
    return character if category[0] in "LMN" else " "
