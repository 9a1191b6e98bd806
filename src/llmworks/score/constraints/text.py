"""Split texts into words and sentences without NLP libraries. Pure functions."""

from __future__ import annotations

import re
import string

ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Inc|Ltd|Jr|Sr|Co|vs|etc|e\.g|i\.e|Ph\.D|No|Fig)|\b[A-Z])\.$"
)
END = re.compile(r"[.!?]+[\"'”’)]*(?=[\s<]|$)")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences at full stops, question and exclamation marks.

    Common abbreviations and initials do not end a sentence.
    """
    line = " ".join(text.split())
    out, begin = [], 0
    for end in END.finditer(line):
        if (
            end[0].startswith(".")
            and len(end[0].rstrip("\"'”’)")) == 1
            and ABBREVIATION.search(line[begin : end.start() + 1])
            and end.end() < len(line)
        ):
            continue
        out.append(line[begin : end.end()].strip())
        begin = end.end()
    rest = line[begin:].strip()
    return [s for s in [*out, rest] if s]


def strip_punctuation(word: str) -> str:
    """Strip punctuation and spaces from a word."""
    return word.strip(string.punctuation + " ")


def remove_punctuation(text: str) -> str:
    """Remove ASCII punctuation from a text."""
    return text.translate(str.maketrans("", "", string.punctuation))


def tokenize_words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, similar to Penn Treebank tokenization."""
    return re.findall(r"\w+(?:[-.]\w+)*|[^\w\s]", text)
