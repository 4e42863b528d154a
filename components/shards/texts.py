"""What can be wrong with a text before anybody trains on it: how it is written, in which script, and how long it is.

Each check gives one sentence that says what is wrong and what to do, or None. They judge by letters alone: a text in a
wrong language of the right script (Spanish declared as French) passes here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from components.evaluation.normalise import base_language

_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2039\u203a", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
)
_MODIFIER_APOSTROPHE = "\u02bc"  # an apostrophe for most, a letter of these:
_KEEPS_MODIFIER = frozenset({"uk", "be", "br", "ha", "haw", "nv", "uz"})
_JOINERS = "\u200c\u200d"  # they part words in Persian and shape letters in Indic scripts and emoji: kept in words
_VISIBLE_FORMAT = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
_LINE_LIKE = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85")

_WRITTEN_IN = {  # script, as the names of its letters begin in Unicode: languages
    "LATIN": (
        "af az bs ca ceb cs cy da de en eo es et eu fi fil fo fr fy ga gl gn gsw ha haw hr ht hu id ig is it jv ku la "
        "lb ln lt lv mg mi ms mt nl nn no nb nso ny oc om pl pt qu rm ro rw sk sl sm sn so sq sr st su sv sw tk tl tn "
        "to tr ts uz vi wo xh yo zu"
    ),
    "CYRILLIC": "az ba be bg bs ce cv kk ku ky mk mn os ru sr tg tk tt uk uz",
    "ARABIC": "ar arz ary az ckb fa kk ku ky ms pa ps sd tg tk ug ur uz",
    "DEVANAGARI": "bho hi mai mr ne sa sd",
    "CJK": "cmn ja ko nan wuu yue zh",
    "BOPOMOFO": "cmn nan zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "HEBREW": "he yi",
    "ETHIOPIC": "am ti",
    "BENGALI": "as bn",
    "GURMUKHI": "pa",
    "MONGOLIAN": "mn",
    "TIFINAGH": "zgh",
    "GREEK": "el",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "TIBETAN": "bo",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "TAMIL": "ta",
    "TELUGU": "te",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "GUJARATI": "gu",
    "ORIYA": "or",
    "SINHALA": "si",
    "THAANA": "dv",
}
_SCRIPTS = {
    language: tuple(script for script, languages in _WRITTEN_IN.items() if language in languages.split())
    for language in " ".join(_WRITTEN_IN.values()).split()
}
MOST_FOREIGN = 0.5  # of the letters may be of other scripts,
MOST_LATIN = 0.7  # or this many where they are Latin: brands and names are, everywhere
_DECLARED_SCRIPTS = {"latn": "LATIN", "cyrl": "CYRILLIC", "arab": "ARABIC", "deva": "DEVANAGARI"}

# Letters a second that people speak, with room on both sides: fluent English has 12 to 15, Mandarin 4 to 6.
ALPHABET = (2.0, 25.0)
_RATES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("ARABIC", "HEBREW", "ETHIOPIC", "THAANA"), (1.5, 20.0)),  # vowels are not written, or with them
    **dict.fromkeys(("CJK", "BOPOMOFO", "HANGUL"), (0.8, 13.0)),  # a letter is a syllable
    **dict.fromkeys(("HIRAGANA", "KATAKANA"), (1.0, 17.0)),
    **dict.fromkeys(("DEVANAGARI", "BENGALI", "GURMUKHI", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM"), (1.2, 20.0)),
    **dict.fromkeys(("GUJARATI", "ORIYA", "SINHALA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), (1.2, 20.0)),
}
PAUSE = 1.0  # seconds of silence around the speech that are nobody's fault
TIGHT = 0.1  # seconds of a word's first and last sound that are often cut off
DIGIT = 3  # letters that a digit is spoken as, about


def normalise(text: str, language: str | None = None) -> str:
    """The text in NFC with plain quotes and spaces, without control and invisible characters; its words stay.

    Applying it twice changes nothing. Joiners stay between letters, where Persian and Indic words need them, and in the
    languages that have a modifier apostrophe as a letter so does that.
    """
    text = text.translate(_PLAIN)
    if base_language(language) not in _KEEPS_MODIFIER:
        text = text.replace(_MODIFIER_APOSTROPHE, "'")
    text = unicodedata.normalize("NFC", "".join(_kept(character) for character in text))
    text = re.sub(f"[{_JOINERS}]+", _joiner, text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if character in _LINE_LIKE or category[0] == "Z":
        return " "
    if category in ("Cc", "Cs") or (
        category == "Cf" and character not in _VISIBLE_FORMAT and character not in _JOINERS
    ):
        return ""
    return character


def _joiner(found: re.Match[str]) -> str:
    """The first of a run of joiners where both sides can be joined, else nothing."""
    before, after = found.string[found.start() - 1 : found.start()], found.string[found.end() : found.end() + 1]
    joins = before and after and all(ord(side) > 0x5FF and not side.isspace() for side in (before, after))
    return found[0][0] if joins else ""


def language_fault(text: str, language: str | None) -> str | None:
    """Why the letters of a text are not those of the language that it is declared to be in, or None.

    Languages that the table does not know pass, and so do texts without letters.
    """
    expected = _expected(language)
    if not expected:
        return None
    counts = _scripts(text)
    foreign = sum(count for script, count in counts.items() if script not in expected)
    latin = 0 if "LATIN" in expected else counts["LATIN"]
    if foreign - latin <= MOST_FOREIGN * counts.total() and foreign <= MOST_LATIN * counts.total():
        return None
    script, count = max(counts.items(), key=lambda item: (item[0] not in expected, item[1], item[0]))
    share = f"{count} of {counts.total()} letters are {script.capitalize()}"
    wanted = " or ".join(name.capitalize() for name in expected)
    return f"the text is declared {language}, written in {wanted}, but {share}; correct the language or the text"


def _expected(language: str | None) -> tuple[str, ...]:
    """Scripts of a language; `sr-Latn` names its own."""
    for part in re.split(r"[-_]", (language or "").strip().lower())[1:]:
        if part in _DECLARED_SCRIPTS:
            return (_DECLARED_SCRIPTS[part],)
    return _SCRIPTS.get(base_language(language), ())


def letters(text: str) -> int:
    """Letters of a text, without marks; a digit counts as DIGIT, because it is spoken as a word."""
    categories = Counter(unicodedata.category(character)[0] for character in text)
    return categories["L"] + DIGIT * categories["N"]


def chars_per_second(text: str, seconds: float) -> float:
    """Letters a second, as `ratio_fault` counts them; 0 for a clip of no length."""
    return letters(text) / seconds if seconds > 0 else 0.0


def ratio_fault(text: str, seconds: float, letters_per_second: tuple[float, float] | None = None) -> str | None:
    """Why a text cannot be what is said in a clip of so many seconds: too few or too many letters for it; or None.

    The bounds are those of the script that most of the text is in, unless they are given. PAUSE seconds may be silent
    before the text counts as short, TIGHT seconds lack before it counts as long. Without letters there is no fault.
    """
    count = letters(text)
    if not count or seconds <= 0:
        return None
    script = max(_scripts(text).items(), key=lambda item: (item[1], item[0]), default=("LATIN", 0))[0]
    low, high = letters_per_second or _RATES.get(script, ALPHABET)
    ratio = f"{count} letters in {seconds:.2f} s"
    if count > high * (seconds + TIGHT):
        return f"{ratio} are more than {high:g} a second; check whether the audio is cut off or the text is not its own"
    if count < low * (seconds - PAUSE):
        return (
            f"{ratio} are fewer than {low:g} a second; check whether the text is all that is said, and cut silence off"
        )
    return None


def _scripts(text: str) -> Counter[str]:
    """Letters of a text by script."""
    found = Counter(text)
    scripts: Counter[str] = Counter()
    for character, count in found.items():
        script = _script(character)
        if script:
            scripts[script] += count
    return scripts


@lru_cache(maxsize=1 << 14)
def _script(character: str) -> str:
    """Script of a letter by its Unicode name, "" for anything else: LATIN, CYRILLIC, CJK, HIRAGANA, ..."""
    plain = unicodedata.normalize("NFKC", character)[:1]  # full-width and other forms of a letter are the letter
    if not unicodedata.category(plain).startswith("L"):
        return ""
    script = unicodedata.name(plain, "").split(" ")[0]
    return "" if script in ("MODIFIER", "FEMININE", "MASCULINE", "") else script
