"""Texts are cleaned without changing words, and those in a wrong script or of an impossible length are found."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.shards.texts import chars_per_second, language_fault, letters, normalise, ratio_fault

WRITTEN = [
    ("  two\u00a0words\u3000here\n", "en", "two words here"),
    ("\u201cIt\u2019s\u201d \u201aso\u2018 \u00abl\u00e0\u00bb", "en", '"It\'s" \'so\' "l\u00e0"'),
    ("cafe\u0301", "fr", "caf\u00e9"),
    ("zero\u200bwidth soft\u00adhyphen \ufeffbom \u202eturned\u202c", "en", "zerowidth softhyphen bom turned"),
    ("bell\x07 nul\x00 tab\tline\r\nend", "en", "bell nul tab line end"),
    ("می\u200cخواهم", "fa", "می\u200cخواهم"),
    ("क्\u200dष", "hi", "क्\u200dष"),
    ("a\u200db \u200c c", "en", "ab c"),
    ("сім\u02bcя", "uk", "сім\u02bcя"),
    ("don\u02bct", "en", "don't"),
    ("「日本語」　です。", "ja", "「日本語」 です。"),
    ("Straße ½ ﬁ K", "de", "Straße ½ ﬁ K"),
    ("", None, ""),
]


@pytest.mark.parametrize(("text", "language", "wanted"), WRITTEN)
def test_normalise(text: str, language: str | None, wanted: str) -> None:
    assert normalise(text, language) == wanted


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=()), max_size=40), st.sampled_from([None, "en", "uk", "fa", "zh"]))
def test_normalise_is_settled_after_once(text: str, language: str | None) -> None:
    once = normalise(text, language)
    assert normalise(once, language) == once
    once.encode()
    assert once == once.strip() and "  " not in once
    assert not any(unicodedata.category(character) == "Cc" for character in once)


@settings(max_examples=40)
@given(st.text(st.characters(categories=["Lu", "Ll", "Nd"], max_codepoint=0x24F), max_size=40))
def test_normalise_leaves_plain_words_alone(text: str) -> None:
    assert normalise(text, "en") == unicodedata.normalize("NFC", text)


def test_language_by_script() -> None:
    fault = language_fault("Плоскогубцы и молоток.", "en")
    assert fault == (
        "the text is declared en, written in Latin, but 19 of 19 letters are Cyrillic; correct the language or the text"
    )
    assert "Latin" in (language_fault("pliers", "ru") or "")
    assert "Hiragana" in (language_fault("これはペンです", "zh-CN") or "")
    assert "Latin" in (language_fault("dobar dan", "sr-Cyrl") or "")
    good = [
        *(("Pliers!", "en"), ("Плоскогубцы", "ru"), ("خلف", "ar"), ("一个老虎钳。", "zh"), ("これは漢字です", "ja")),
        *(
            ("カタカナ", "ja"),
            ("한국어", "ko"),
            ("dobar dan", "sr"),
            ("добар дан", "sr"),
            ("นี่", "th"),
            ("Ｗｉｄｅ", "en"),
        ),
        *(("1984 – 42 %", "ru"), ("", "en"), ("что угодно", "tlh"), ("что угодно", None), ("Купил iPhone", "ru_RU")),
    ]
    assert [(text, fault) for text, name in good if (fault := language_fault(text, name))] == []


def test_letters_a_second() -> None:
    assert letters("It's 42 %: café") == 3 + 2 * 3 + 4
    assert letters("क्षि") == 2  # marks are part of their letter
    assert chars_per_second("twelve", 1.5) == pytest.approx(4.0)
    assert chars_per_second("twelve", 0.0) == 0.0
    fault = ratio_fault("a sentence that is far too long for so short a clip", 1.0)
    assert fault is not None and fault.startswith("40 letters in 1.00 s are more than 25 a second; check whether")
    assert "fewer than 2 a second" in (ratio_fault("yes", 12.0) or "")
    assert "more than 13" in (ratio_fault("这个句子比录音长得多所以一定有什么地方不对", 1.0) or "")
    assert ratio_fault("这个句子和录音一样长", 2.5) is None
    assert ratio_fault("خلف", 1.0) is None
    assert ratio_fault("three", 0.18) is None  # cut tightly
    assert ratio_fault("yes", 2.0) is None  # silence before and after
    assert ratio_fault("...", 5.0) is None and ratio_fault("word", 0.0) is None
    assert "more than 3 a second" in (ratio_fault("a sentence", 1.0, (1.0, 3.0)) or "")


def test_real_manifests(shared_data: Path) -> None:
    """Nothing is flagged but 168 clips of emodb, which were cut at 2 s while their text goes on."""
    flagged: Counter[str] = Counter()
    rows = 0
    for path in sorted(shared_data.glob("*/manifest.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if not row.get("text"):
                continue
            rows += 1
            assert language_fault(row["text"], row["language"]) is None
            for language, text in row.get("translation", {}).items():
                assert language_fault(text, language) is None
            if ratio_fault(row["text"], row["duration"]):
                flagged[path.parent.name] += 1
                assert row["duration"] == 2.0
    assert rows == 4187
    assert flagged == {"emodb": 168}
