"""What the stated normalisation does, language by language."""

from __future__ import annotations

import pytest

from components.evaluation.normalise import is_unspaced, normalise

CASES = [
    ("Mr. O\u2019Neil's well-known  \u201crock 'n' roll\u201d!", "en", "mister o'neil's well known rock n roll"),
    ("It\u00b4s a `dog`.", "en", "it's a dog"),
    ("L'été d\u2019Ève — voilà…", "fr", "l'été d'ève voilà"),
    ("Der Lappen liegt auf dem Eisschrank.", "de", "der lappen liegt auf dem eisschrank"),
    ("Dr. Straße", "de", "dr straße"),  # titles are written out in English only
    ("Плоскогубцы.", "ru", "плоскогубцы"),
    ("नमस्ते, दुनिया।", "hi", "नमस्ते दुनिया"),  # vowel marks are letters here
    ("خلف!", "ar", "خلف"),
    ("\ufb01ne\u00ad print ２０２６", "en", "fine print 2026"),
    ("一个 老虎钳。", "zh-TW", "一个老虎钳"),
    ("<script>alert(1)</script>", "en", "script alert 1 script"),
    ("", "en", ""),
    (" … ' — ", None, ""),
]


@pytest.mark.parametrize(("text", "language", "expected"), CASES)
def test_normalised_text_is_as_stated_and_stays(text: str, language: str | None, expected: str) -> None:
    once = normalise(text, language)
    assert once == expected
    assert normalise(once, language) == once


def test_two_ways_to_write_a_text_meet() -> None:
    assert normalise("Cafe\u0301", "fr") == normalise("CAFÉ", "fr") == "café"


def test_unspaced_languages() -> None:
    assert [is_unspaced(code) for code in ("zh", "zh_Hant", "JA", "th", "en", None, "")] == [True] * 4 + [False] * 3
