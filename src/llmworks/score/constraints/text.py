"""Words and sentences of a text, without tools. Pure functions."""

from __future__ import annotations

import re
import string

ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Inc|Ltd|Jr|Sr|Co|vs|etc|e\.g|i\.e|Ph\.D|No|Fig)|\b[A-Z])\.$"
)
END = re.compile(r"[.!?]+[\"'”’)]*(?=[\s<]|$)")


def sentences(text: str) -> list[str]:
    """The sentences of a text: they end in full stops, question or exclamation marks, but for usual abbreviations and
    initials.
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


def bare(word: str) -> str:
    """A word without punctuation and spaces around it."""
    return word.strip(string.punctuation + " ")


def without_punctuation(text: str) -> str:
    """A text without ASCII punctuation."""
    return text.translate(str.maketrans("", "", string.punctuation))


def tokens(text: str) -> list[str]:
    """Words and punctuation marks, each apart (about as the Penn treebank divides them)."""
    return re.findall(r"\w+(?:[-.]\w+)*|[^\w\s]", text)
