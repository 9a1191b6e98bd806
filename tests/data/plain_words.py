"""Words of a text, character by character, as an oracle for the vectorized ones."""

from __future__ import annotations

import re
import unicodedata

SPACELESS = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA LETTER", "KATAKANA LETTER", "THAI ")
SPACELESS += ("LAO ", "KHMER ", "MYANMAR ", "IDEOGRAPHIC ITERATION", "HALFWIDTH KATAKANA LETTER")
INVISIBLE = "\u00ad\u200b\u200e\u200f\u2060\ufeff"


def plain_words(text: str) -> list[str]:
    """Runs of letters, digits, marks and symbols; single characters, with their marks, of scripts without spaces."""
    if text.isascii():
        return re.findall(r"[0-9a-z]+", text.lower())
    words: list[str] = []
    open_word = alone = False
    for c in unicodedata.normalize("NFC", text).lower():
        category, name = unicodedata.category(c)[0], unicodedata.name(c, "")
        if c in INVISIBLE:
            continue
        if (c.isascii() and not c.isalnum()) or category in "PZ":
            open_word = alone = False
        elif alone and category == "M":
            words[-1] += c
        elif name.startswith(SPACELESS):
            words.append(c)
            open_word, alone = False, True
        elif open_word:
            words[-1] += c
        else:
            words.append(c)
            open_word, alone = True, False
    return words
