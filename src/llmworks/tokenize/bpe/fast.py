"""Encode much text fast: a byte-level BPE tokenizer's own merges run by tiktoken, most words looked up, with the same
ids.

Works for tokenizers whose pre-tokenizer is byte-level with a pattern that is known; `bulk_encoder` checks ids on a
probe before it is trusted, and gives None for all others, which are encoded by `tokenizers` itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any

from llmworks.core.errors import MissingDependency

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_DIGITS = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""  # digits stand alone
)
# The same for Python. A run that goes on beyond ASCII is taken whole, up to the next white space, where both patterns
# divide in any case.
# The fifth and the last alternative match where that is not certain: before what may be a number, and other white
# space.
_SPACE, _LETTERS = (
    r"\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
    r"\xa1\xab\xbf-\u024f\u0400-\u0481\u2010-\u2027\u3041-\u30ff\u4e00-\u9fff",
)
_WORDS = (
    r" ?[A-Za-z]++(?![^\0-\x7f])|'(?:[stmd]|re|ve|ll)|{digits}|"
    r" ?[\0-\x08\x0e-\x1f!-/:-@\[-`{{-\x7f]++(?![^\0-\x7f])|[\t-\r ]{{2,}}[^\0-\x7f{letters}]|{before}"
    r"[\t-\r ]+(?![^\t-\r {space}])| ?[^\t-\r {space}]+|[\t-\r ]+|[{space}]"
)
WORDS = {
    GPT2: re.compile(_WORDS.format(digits=r" ?[0-9]++(?![^\0-\x7f])", before="", letters=_LETTERS, space=_SPACE)),
    GPT2_DIGITS: re.compile(
        _WORDS.format(digits="[0-9]", before=r"[\t-\r ]+(?=[0-9])|", letters=_LETTERS, space=_SPACE)
    ),
}
RUN = 5000
_RUN = re.compile(rf"\s{{{RUN}}}")
_NEW = re.compile(
    "[\U00011de0-\U00011de9\U00016ff4-\U00016ff6\ud800-\udfff]"
)  # digits of Unicode 17, which tiktoken does not know, and what is no text
PROBE = (
    "Hello world, it's 1234.5 tests!  Two  spaces\n\n\tindent = {'key': [1, 22, 333]}  \n they'll I'VE don't",
    "Grüße aus Köln – 日本語のテキスト мир ١٢٣ ½ ²  \u00a0x\u3000y 🙂👩‍💻 \r\n end ",
    "    def f(x):\n        return x ** 2  # a comment\n\n\n7 8 9 a1b2 _under_score --flag=1",
    "“It’s café-owned,” said naïve 3é é3 a½ \n\n“Yes”\t–x  7é",
)
KEPT, LONGEST = 100_000, 32  # words that are remembered, and characters of one


def byte_characters() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


class _Uncertain(Exception):
    """The text might be divided otherwise."""


class _Absent(Exception):
    """The text has a byte without a token, or something else that tiktoken does not take as the tokenizer does."""


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words, found when they are first asked for."""

    def __init__(self, merge: Callable[[str], list[int]]) -> None:
        self._merge = merge

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not word.isascii() and word[:2].isspace():
            raise _Uncertain
        ids = tuple(self._merge(word))
        if len(word) <= LONGEST and len(self) < KEPT:
            self[word] = ids
        return ids


class BulkEncoder:
    """Texts to ids without a beginning and an end, as the tokenizer that it was made from gives them.

    `ids` are those of tiktoken's ranks, -1 for a byte without a token; `added` are the tokens that are found in any
    text.
    """

    def __init__(
        self, encoding: Any, ids: Sequence[int], tokenizer: Any, added: Sequence[str], words: re.Pattern[str] | None
    ) -> None:
        self._encoding, self._ids, self._tokenizer = encoding, ids, tokenizer
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._first = "".join(sorted({token[0] for token in added}))
        self._split = words.findall if words else None
        self._known = _Words(self._merge).__getitem__

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._by_library(text) if self.holds_added(text) else self.encode_ordinary(text)

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text that holds no added token."""
        try:
            if self._split is None:
                return self._merge(text)
            return list(chain.from_iterable(map(self._known, self._split(text))))
        except _Uncertain:
            return self._merge_whole(text)
        except _Absent:
            return self._by_library(text)

    def holds_added(self, text: str) -> bool:
        """Whether the text holds an added token."""
        for first in self._first:
            if first in text:
                return self._added.search(text) is not None
        return False

    def _merge_whole(self, text: str) -> list[int]:
        try:
            return self._merge(text)
        except _Absent:
            return self._by_library(text)

    def _by_library(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _merge(self, text: str) -> list[int]:
        if len(text) > RUN and _RUN.search(text):  # more than tiktoken's stack takes
            raise _Absent
        if not text.isascii() and _NEW.search(text):
            raise _Absent
        ids = [self._ids[rank] for rank in self._encoding.encode_ordinary(text)]
        if -1 in ids:  # the tokenizer leaves such bytes out as it merges
            raise _Absent
        return ids


def bulk_encoder(tokenizer: Any) -> BulkEncoder | None:
    """The fast form of a `tokenizers.Tokenizer`, or None when it is of another kind.

    MissingDependency without the extra `corpus`.
    """
    try:
        import tiktoken
    except ImportError:
        raise MissingDependency(
            "bulk encoding needs tiktoken; install it with: pip install 'llmworks[corpus]'"
        ) from None
    state = json.loads(tokenizer.to_str())
    pattern = _pattern(state.get("pre_tokenizer"))
    model = state["model"]
    other = ("unk_token", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        pattern is None
        or model.get("type") != "BPE"
        or any(model.get(name) for name in other)
        or any(state.get(name) for name in ("normalizer", "truncation", "padding"))
    ):
        return None
    characters = byte_characters()

    def as_bytes(token: str) -> bytes | None:
        return bytes(characters[c] for c in token) if all(c in characters for c in token) else None

    vocab: dict[str, int] = model["vocab"]
    # ranks are the order of merges, whatever the ids are
    ranks = {bytes([byte]): byte for byte in range(256)}
    by_byte = {byte: vocab.get(character, -1) for character, byte in characters.items()}
    ids = [by_byte[byte] for byte in range(256)]
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        joined = as_bytes(left + right)
        if joined is None or left + right not in vocab:
            return None
        if joined not in ranks:
            ranks[joined] = len(ids)
            ids.append(vocab[left + right])
    added = sorted((token["content"] for token in state["added_tokens"]), key=len, reverse=True)
    if not _finds_words(tokenizer.model, model, added, lambda token: as_bytes(token) in ranks):
        return None
    try:
        encoding = tiktoken.Encoding("llmworks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # a pattern of the other library's own kind
        return None
    encoder = BulkEncoder(encoding, ids, tokenizer, added, WORDS.get(pattern))
    return encoder if _agrees(encoder, lambda text: tokenizer.encode(text, add_special_tokens=False).ids) else None


def _pattern(pre: Any) -> str | None:
    """The regular expression that divides text as a pre-tokenizer does, where it is known."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    if not steps or not steps[-1] or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    before, last = steps[:-1], steps[-1]
    if not before:
        return GPT2 if last.get("use_regex", True) else None
    if len(before) > 1:
        return None
    step = before[0]
    if step["type"] == "Digits" and step.get("individual_digits") and last.get("use_regex", True):
        return GPT2_DIGITS
    if (
        step["type"] == "Split"
        and step.get("behavior") == "Isolated"
        and not step.get("invert")
        and not last.get("use_regex", True)
    ):
        found: str = step["pattern"].get("Regex") or ""
        if found in WORDS:
            return found
        return (
            rf"{found}|(?:(?!{found})[\s\S])+" if _least_width(found) else None
        )  # what it leaves out between two finds is a piece too
    return None


def _least_width(pattern: str) -> int:
    """The fewest characters that a pattern finds; 0 for one that is not understood."""
    from re import _parser  # type: ignore[attr-defined]

    try:
        return int(
            _parser.parse(re.sub(r"\\[pP](?:\{[^}]*\}|\w)", "a", pattern)).getwidth()[0]
        )  # Python knows no \p{L}
    except (re.error, OverflowError, RecursionError):
        return 0


def _finds_words(bpe: Any, model: Mapping[str, Any], added: Collection[str], ranked: Callable[[str], bool]) -> bool:
    """Whether every word that is a token becomes that token, which tiktoken takes for granted.

    Then its merges, which go by the rank of what is made, are those of the tokenizer, which go by the rank of the pair.
    """
    if model.get("ignore_merges"):
        return all(ranked(token) for token in model["vocab"] if token not in added)
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]}
    return all(len(bpe.tokenize(token)) == 1 for token in made)


def _agrees(encoder: BulkEncoder, reference: Callable[[str], list[int]]) -> bool:
    return all(encoder.encode(text) == reference(text) for text in PROBE)
