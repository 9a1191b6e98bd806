"""Fast bulk encoding: run a byte-level BPE tokenizer's merges with tiktoken and a word cache, with identical ids.

Works for tokenizers whose pre-tokenizer is byte-level with a known pattern; `build_bulk_encoder` verifies the ids on
probe texts, and returns None for all other tokenizers, which `tokenizers` itself encodes.
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
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""  # each digit is a word
)
# The same for Python's `re`. A run that continues beyond ASCII is taken whole, up to the next white space, where both
# patterns split in any case. The fifth and the last alternative match where that is not certain: before what may be a
# number, and other white space.
_SPACE, _LETTERS = (
    r"\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000",
    r"\xa1\xab\xbf-\u024f\u0400-\u0481\u2010-\u2027\u3041-\u30ff\u4e00-\u9fff",
)
_WORDS = (
    r" ?[A-Za-z]++(?![^\0-\x7f])|'(?:[stmd]|re|ve|ll)|{digits}|"
    r" ?[\0-\x08\x0e-\x1f!-/:-@\[-`{{-\x7f]++(?![^\0-\x7f])|[\t-\r ]{{2,}}[^\0-\x7f{letters}]|{before}"
    r"[\t-\r ]+(?![^\t-\r {space}])| ?[^\t-\r {space}]+|[\t-\r ]+|[{space}]"
)
WORD_PATTERNS = {
    GPT2: re.compile(_WORDS.format(digits=r" ?[0-9]++(?![^\0-\x7f])", before="", letters=_LETTERS, space=_SPACE)),
    GPT2_DIGITS: re.compile(
        _WORDS.format(digits="[0-9]", before=r"[\t-\r ]+(?=[0-9])|", letters=_LETTERS, space=_SPACE)
    ),
}
MAX_WHITESPACE_RUN = 5000
_RUN = re.compile(rf"\s{{{MAX_WHITESPACE_RUN}}}")
_NEW = re.compile(
    "[\U00011de0-\U00011de9\U00016ff4-\U00016ff6\ud800-\udfff]"
)  # digits of Unicode 17, which tiktoken does not know, and surrogates
PROBE_TEXTS = (
    "Hello world, it's 1234.5 tests!  Two  spaces\n\n\tindent = {'key': [1, 22, 333]}  \n they'll I'VE don't",
    "Grüße aus Köln – 日本語のテキスト мир ١٢٣ ½ ²  \u00a0x\u3000y 🙂👩‍💻 \r\n end ",
    "    def f(x):\n        return x ** 2  # a comment\n\n\n7 8 9 a1b2 _under_score --flag=1",
    "“It’s café-owned,” said naïve 3é é3 a½ \n\n“Yes”\t–x  7é",
)
CACHE_SIZE, MAX_CACHED_LENGTH = 100_000, 32  # maximum number of cached words, and characters of a cached word


def get_byte_characters() -> dict[str, int]:
    """Return GPT-2's mapping of printable characters to the 256 bytes (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


class _AmbiguousSplit(Exception):
    """The tokenizer might split the text into other words."""


class _UnsupportedText(Exception):
    """The text has a byte without a token, or something else that tiktoken encodes differently."""


class _WordCache(dict[str, tuple[int, ...]]):
    """Cache of the ids of words, filled on first use."""

    def __init__(self, merge: Callable[[str], list[int]]) -> None:
        self._merge = merge

    def __missing__(self, word: str) -> tuple[int, ...]:
        if not word.isascii() and word[:2].isspace():
            raise _AmbiguousSplit
        ids = tuple(self._merge(word))
        if len(word) <= MAX_CACHED_LENGTH and len(self) < CACHE_SIZE:
            self[word] = ids
        return ids


class BulkEncoder:
    """Encode texts, without bos and eos, to the ids of the original tokenizer.

    `ids` maps tiktoken's ranks to token ids, -1 for a byte without a token; `added` are the added tokens, which are
    recognized in any text.
    """

    def __init__(
        self, encoding: Any, ids: Sequence[int], tokenizer: Any, added: Sequence[str], words: re.Pattern[str] | None
    ) -> None:
        self._encoding, self._ids, self._tokenizer = encoding, ids, tokenizer
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._first = "".join(sorted({token[0] for token in added}))
        self._split = words.findall if words else None
        self._lookup = _WordCache(self._merge).__getitem__

    def encode(self, text: str) -> list[int]:
        """Encode one text."""
        return self._encode_with_tokenizer(text) if self.has_added_token(text) else self.encode_ordinary(text)

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode a text that contains no added token."""
        try:
            if self._split is None:
                return self._merge(text)
            return list(chain.from_iterable(map(self._lookup, self._split(text))))
        except _AmbiguousSplit:
            return self._merge_whole(text)
        except _UnsupportedText:
            return self._encode_with_tokenizer(text)

    def has_added_token(self, text: str) -> bool:
        """Return whether the text contains an added token."""
        for first in self._first:
            if first in text:
                return self._added.search(text) is not None
        return False

    def _merge_whole(self, text: str) -> list[int]:
        try:
            return self._merge(text)
        except _UnsupportedText:
            return self._encode_with_tokenizer(text)

    def _encode_with_tokenizer(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _merge(self, text: str) -> list[int]:
        if len(text) > MAX_WHITESPACE_RUN and _RUN.search(text):  # would overflow tiktoken's stack
            raise _UnsupportedText
        if not text.isascii() and _NEW.search(text):
            raise _UnsupportedText
        ids = [self._ids[rank] for rank in self._encoding.encode_ordinary(text)]
        if -1 in ids:  # the tokenizer drops such bytes before merging
            raise _UnsupportedText
        return ids


def build_bulk_encoder(tokenizer: Any) -> BulkEncoder | None:
    """Return the fast encoder of a `tokenizers.Tokenizer`, or None when it is not supported.

    Errors: MissingDependency without the extra `corpus`.
    """
    try:
        import tiktoken
    except ImportError:
        raise MissingDependency(
            "bulk encoding needs tiktoken; install it with: pip install 'llmworks[corpus]'"
        ) from None
    state = json.loads(tokenizer.to_str())
    pattern = _find_split_pattern(state.get("pre_tokenizer"))
    model = state["model"]
    other = ("unk_token", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if (
        pattern is None
        or model.get("type") != "BPE"
        or any(model.get(name) for name in other)
        or any(state.get(name) for name in ("normalizer", "truncation", "padding"))
    ):
        return None
    characters = get_byte_characters()

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
    if not _has_reachable_tokens(tokenizer.model, model, added, lambda token: as_bytes(token) in ranks):
        return None
    try:
        encoding = tiktoken.Encoding("llmworks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # a pattern that tiktoken's regex engine does not support
        return None
    encoder = BulkEncoder(encoding, ids, tokenizer, added, WORD_PATTERNS.get(pattern))
    return (
        encoder if _is_equivalent(encoder, lambda text: tokenizer.encode(text, add_special_tokens=False).ids) else None
    )


def _find_split_pattern(pre: Any) -> str | None:
    """Return the regular expression that splits text as a pre-tokenizer does, or None when it is not known."""
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
        if found in WORD_PATTERNS:
            return found
        return (
            rf"{found}|(?:(?!{found})[\s\S])+" if _compute_min_width(found) else None
        )  # the text between two matches is a piece too
    return None


def _compute_min_width(pattern: str) -> int:
    """Return the minimum number of characters that a pattern matches; 0 for one that cannot be parsed."""
    from re import _parser  # type: ignore[attr-defined]

    try:
        return int(
            _parser.parse(re.sub(r"\\[pP](?:\{[^}]*\}|\w)", "a", pattern)).getwidth()[0]
        )  # Python's re does not support \p{L}
    except (re.error, OverflowError, RecursionError):
        return 0


def _has_reachable_tokens(
    bpe: Any, model: Mapping[str, Any], added: Collection[str], ranked: Callable[[str], bool]
) -> bool:
    """Return whether every token that is a word encodes to that token, which tiktoken assumes.

    Then tiktoken's merges, ranked by the merged token, equal those of the tokenizer, ranked by the pair.
    """
    if model.get("ignore_merges"):
        return all(ranked(token) for token in model["vocab"] if token not in added)
    made = {"".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]}
    return all(len(bpe.tokenize(token)) == 1 for token in made)


def _is_equivalent(encoder: BulkEncoder, reference: Callable[[str], list[int]]) -> bool:
    return all(encoder.encode(text) == reference(text) for text in PROBE_TEXTS)
