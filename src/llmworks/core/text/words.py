"""Words of any script: folded in one way, and split where the script has no spaces.

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces between words; each of their characters, with
its marks, counts as a word.
"""

from __future__ import annotations

import unicodedata

import regex

SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = regex.compile(
    rf"[{SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{N}}_]--[{SPACELESS}]][\p{{L}}\p{{N}}\p{{M}}_--[{SPACELESS}]]*", regex.V1
)
QUOTES = str.maketrans({**dict.fromkeys("\u2018\u2019\u02bc", "'"), **dict.fromkeys("\u201c\u201d", '"')})
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff\u00ad"))


def fold(text: str) -> str:
    """Return a text for comparison: NFC, case-folded, straight quotes, single spaces; without fullwidth forms and
    invisible characters.
    """
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text)
    text = unicodedata.normalize("NFC", text.translate(QUOTES).translate(INVISIBLE)).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())


def count_words(text: str) -> int:
    """Count the words of a text."""
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """Return the folded words of a text, without punctuation."""
    return WORD.findall(fold(text))
