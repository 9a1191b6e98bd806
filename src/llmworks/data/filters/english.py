"""English word tokenizer equivalent to spaCy's blank English tokenizer, which datatrove's published filters use.

A whitespace-separated chunk is split by prefix, suffix and infix rules and a table of tokenizer exceptions.
The rules are reimplemented from spaCy's `lang/en` and `lang/punctuation` (MIT license). `words` counts whole texts.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Container
from itertools import pairwise
from pathlib import Path

_LISTS = json.loads(Path(__file__).with_name("english.json").read_text(encoding="utf-8"))
SYMBOLS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
CURRENCY = "$£€¥฿₽﷼₴" + "".join(map(chr, range(0x20A0, 0x20C0)))
UNITS: list[str] = _LISTS["units"]
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"

ABBREVIATIONS: list[str] = _LISTS["abbreviations"]
EMOTICONS: list[str] = _LISTS["emoticons"]
DROPPED_G = "doin goin nothin nuthin ol somethin lovin havin"
NOT_SPLIT = frozenset(_LISTS["not_split"])
OTHERS = (
    "y'|all y|all how|'d|'y How|'d|'y not|'ve not|ve Not|'ve Not|ve can|not Can|not gon|na Gon|na got|ta Got|ta let|'s"
    " Let|'s c'm|on C'm|on"
)


def _contractions() -> dict[str, tuple[str, ...]]:
    """Build contractions of pronouns, question words and verbs, with and without the apostrophe, also capitalized."""
    found: set[tuple[str, ...]] = set()

    def join(words: str, *endings: str) -> None:
        for word in words.split():
            for ending in endings:
                parts = ending.split("|")
                found.add((word, *parts))
                found.add((word, *(p.replace("n't", "nt") if "n't" in p else p.replace("'", "") for p in parts)))

    join("i", "'m", "'m|a")
    join("i you he she it we they", "'ll", "'ll|'ve", "'d", "'d|'ve")
    join("i you we they", "'ve")
    join("you we they", "'re")
    join("he she it", "'s")
    join("who what when where why how there that this these those", "'ll", "'ll|'ve", "'d", "'d|'ve")
    join("who what when where why how there that this", "'s")
    join("who what when where why how there these those", "'re", "'ve")
    join("ca could do does did had may might must need ought sha should wo would", "n't", "n't|'ve")
    join("could might must should would", "'ve")
    join("ai are is was were have has dare", "n't")
    every = found | {(w.title(), *rest) for w, *rest in found}
    return {"".join(parts): tuple(parts) for parts in every}


@functools.cache
def tokenizer_exceptions() -> dict[str, tuple[str, ...]]:
    """Return the tokenizer exceptions: unsplit abbreviations, contractions, times of day."""
    table = _contractions()
    for word in DROPPED_G.split():
        for form in (word, word.title()):
            table[form], table[form + "'"] = (form,), (form + "'",)
    for hour in range(1, 13):
        for period in ("a.m.", "am", "p.m.", "pm"):
            table[f"{hour}{period}"] = (str(hour), period)
    for line in OTHERS.split():
        table[line.replace("|", "")] = tuple(line.split("|"))
    table |= {word: (word,) for word in (*ABBREVIATIONS, *EMOTICONS, "em", "ll", "nuff")}
    table |= {f"{letter}.": (f"{letter}.",) for letter in "abcdefghijklmnopqrstuvwxyzäöü"}
    table |= {
        chunk.replace("'", "’"): tuple(p.replace("'", "’") for p in parts)
        for chunk, parts in table.items()
        if "'" in chunk
    }
    return {chunk: parts for chunk, parts in table.items() if chunk not in NOT_SPLIT}


BEGINS = frozenset("§%=—–" + SYMBOLS + CURRENCY)
ENDS = frozenset(SYMBOLS + "—–")
BEFORE_STOP = frozenset("0123456789%²-+|" + SYMBOLS + QUOTES)
POSSESSIVE = ("'s", "'S", "’s", "’S")
DOLLARS = ("US$", "C$", "A$")


def is_lower(char: str) -> bool:
    """Return whether a character is a lowercase letter, or a letter of a script without case."""
    return char.isalpha() and not char.isupper()


def is_upper(char: str) -> bool:
    """Return whether a character is an uppercase letter, or a letter of a script without case."""
    return char.isalpha() and not char.islower()


def is_icon(char: str) -> bool:
    """Return whether a character is a pictograph or another non-currency, non-math symbol (category So)."""
    return char > "\x7f" and unicodedata.category(char) == "So"


def prefix_length(text: str) -> int:
    """Return the length of the prefix that is a token of its own (0 = none)."""
    if text.startswith("……"):
        return 2
    if text.startswith(".."):
        return len(text) - len(text.lstrip("."))
    if text[0] in BEGINS or is_icon(text[0]):
        return 1
    if text[0] == "+":
        return 0 if text[1:2] in DIGITS and text[1:2] else 1
    return next((len(mark) for mark in DOLLARS if text.startswith(mark)), 0)


def suffix_length(text: str) -> int:
    """Return the length of the longest suffix that is a token of its own (0 = none)."""
    last = text[-1]
    if last == ".":
        dots = len(text) - len(text.rstrip("."))
        if dots > 1:
            return dots
        before = text[-2:-1]
        if before and (before in BEFORE_STOP or is_lower(before)):
            return 1
        if before.upper() in "CFK" and text[-3:-2] == "°":
            return 1
        return 1 if len(text) > 2 and is_upper(before) and is_upper(text[-3]) else 0
    if text.endswith(("……", *POSSESSIVE)):
        return 2
    for size in (4, 3, 2, 1):
        if len(text) > size and text[-size - 1] in DIGITS and text[-size:] in AFTER_NUMBER:
            return size
    if last in ENDS or is_icon(last):
        return 1
    return 1 if last == "+" and text[-2:-1] in DIGITS and len(text) > 1 else 0


DIGITS = "0123456789"
AFTER_NUMBER = frozenset((*UNITS, *CURRENCY, *DOLLARS))
ADDRESS = (
    r"(?!(?:10|127)(?:\.\d{1,3}){3})(?!(?:169\.254|192\.168)(?:\.\d{1,3}){2})(?!172\.(?:1[6-9]|2\d|3[01])"
    r"(?:\.\d{1,3}){2})"
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
)
HOST = r"(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+"
URL = re.compile(
    rf"(?:[\w+\-.]{{2,}}://)?(?:\S+(?::\S*)?@)?(?:{ADDRESS}|{HOST}(?P<top>[^\W\d_]{{2,63}}))(?::\d{{2,5}})?(?:"
    rf"[/?#]\S*)?"
)
LETTER = r"(?:[^\W\d_]|[\u3000-\u303f])"  # spaCy counts CJK marks as letters
INFIX = re.compile(
    rf"(?P<dots>\.\.+|…)|(?<=[0-9])[+\-*^](?=[0-9-])|(?P<stop>(?<={LETTER}|[{re.escape(QUOTES)}])\.(?={LETTER}|"
    rf"[{re.escape(QUOTES)}]))"
    rf"|(?<={LETTER}),(?={LETTER})|(?<=[^\W_]|[\u3000-\u303f])(?:---|--|——|[-–—~])(?={LETTER})|(?<=[^\W_]|"
    rf"[\u3000-\u303f])[:<>=/](?={LETTER})|(?P<icon>[^\w\x00-\x7f])"
)


LONGEST, LONGEST_JOINED = 6, 12  # maximum tokens and characters of an exception that the rules would split
PLAIN = re.compile(r"[A-Za-z]+[,;:!?]?|[A-Za-z]*[a-z]{2}\.")


# fast path: brackets, quotes and marks, each a token of its own, around a core that begins and ends with an ASCII
# letter or digit and that no affix rule applies to
WRAPPED = re.compile(
    r"([(\[{<\"'`*_#&]*)((?!US\$|[CA]\$)[A-Za-z0-9](?:\S*[A-Za-z0-9])?)(?<!['’][sS])(?<![0-9][A-Za-z])(?<![0-9]"
    r"[A-Za-z]{2})(?<![0-9][A-Za-z]{3})(?<!/[sh])"
    r"([)\]}>\"'`*,;:!?_#&]*)((?<=[a-z0-9)\]}>\"'`*,;:!?_#&])\.)?"
)
WHOLE = re.compile(r"[\w()\[\]{}&#$%!?;'\"`@|\\]+", re.ASCII)  # contains no infix


def split_chunk(chunk: str) -> tuple[str, ...]:
    """Split a chunk without whitespace into tokens."""
    special = tokenizer_exceptions()
    if chunk in special:
        return special[chunk]
    if PLAIN.fullmatch(chunk):  # fast path: most chunks
        word, mark = (chunk, "") if chunk[-1].isalpha() else (chunk[:-1], chunk[-1])
        if word in special:
            return _reapply_exceptions((*special[word], *mark))
        return (word, mark) if mark else (word,)
    wrapped = WRAPPED.fullmatch(chunk)
    if wrapped:
        begins, core, ends, stop = wrapped.groups("")
        return _reapply_exceptions((*begins, *_split_middle(core), *ends, *stop))
    before, rest, after = _strip_affixes(chunk, special)
    return _reapply_exceptions((*before, *_split_middle(rest), *after))


def _strip_affixes(chunk: str, special: Container[str]) -> tuple[list[str], str, list[str]]:
    """Strip affixes; returns (prefix tokens, rest, suffix tokens). Stops when the rest is an exception."""
    before: list[str] = []
    after: list[str] = []
    rest, last = chunk, 0
    while rest and len(rest) != last and rest not in special:
        last = len(rest)
        start = prefix_length(rest)
        if start and rest[start:] in special:
            before.append(rest[:start])
            rest = rest[start:]
            break
        size = suffix_length(rest[start:]) if start < len(rest) else 0
        if size and rest[:-size] in special:
            after.append(rest[-size:])
            rest = rest[:-size]
            break
        if start:
            before.append(rest[:start])
        if size and start + size <= len(rest):
            after.append(rest[-size:])
            rest = rest[start:-size]
        else:
            rest = rest[start:]
    return before, rest, after[::-1]


def _reapply_exceptions(words: tuple[str, ...]) -> tuple[str, ...]:
    """Reapply exceptions to split tokens: single tokens, or adjacent tokens that together form an exception.

    The longest match wins.
    """
    special, begins = split_exceptions()
    if special.keys().isdisjoint(words) and not any(one + two[0] in begins for one, two in pairwise(words)):
        return words
    found: list[str] = []
    at = 0
    while at < len(words):
        longest = at + 1
        if longest < len(words) and words[at] + words[longest][0] in begins:
            size = len(words[at])
            while (
                longest < len(words)
                and longest < at + LONGEST
                and (size := size + len(words[longest])) <= LONGEST_JOINED
            ):
                longest += 1
        for end in range(longest, at, -1):
            joined = "".join(words[at:end])
            if joined in special:
                found += special[joined]
                at = end
                break
        else:
            found.append(words[at])
            at += 1
    return tuple(found)


@functools.cache
def split_exceptions() -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """Return (exceptions that the rules would split, the only ones to reapply; their prefixes from 2 characters on)."""
    table = {
        chunk: parts
        for chunk, parts in tokenizer_exceptions().items()
        if prefix_length(chunk) or suffix_length(chunk) or _split_infixes(chunk) != (chunk,)
    }
    return table, frozenset(chunk[:size] for chunk in table for size in range(2, len(chunk) + 1))


def _split_middle(rest: str) -> tuple[str, ...]:
    """Split the rest between prefixes and suffixes at infixes, unless it is a URL."""
    if not rest:
        return ()
    if rest in tokenizer_exceptions():
        return tokenizer_exceptions()[rest]
    return _split_infixes(rest)


def _split_infixes(rest: str) -> tuple[str, ...]:
    if not rest:
        return ()
    if WHOLE.fullmatch(rest) or ("." in rest and _is_url(rest)):
        return (rest,)
    parts: list[str] = []
    start = 0
    for match in INFIX.finditer(rest):
        if match.start() == 0 or not _is_split_point(match, rest):
            continue
        if match.start() != start:
            parts.append(rest[start : match.start()])
        parts.append(match.group())
        start = match.end()
    if start < len(rest):
        parts.append(rest[start:])
    return tuple(parts)


def _is_url(text: str) -> bool:
    match = URL.fullmatch(text)
    return match is not None and (match["top"] is None or all(map(is_lower, match["top"])))


def _is_split_point(match: re.Match[str], text: str) -> bool:
    """Return whether an infix match splits: a period splits only between a lowercase and an uppercase letter."""
    if match["icon"]:
        return is_icon(match["icon"])
    if match["stop"]:
        before, after = text[match.start() - 1], text[match.end()]
        return (before in QUOTES or is_lower(before)) and (after in QUOTES or is_upper(after))
    return True
