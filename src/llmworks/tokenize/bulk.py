"""Encode much text fast: a byte-level BPE tokenizer's own merges run by tiktoken, with the same ids.

Works for tokenizers whose pre-tokenizer is byte-level with a pattern that is known; `bulk_encoder` checks ids on a probe before it is
trusted, and gives None for all others, which are encoded by `tokenizers` itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmworks.errors import MissingDependency

Ids = npt.NDArray[np.int32]
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""  # digits stand alone
PROBE = (
    "Hello world, it's 1234.5 tests!  Two  spaces\n\n\tindent = {'key': [1, 22, 333]}  \n they'll I'VE don't",
    "Grüße aus Köln – 日本語のテキスト мир ١٢٣ ½ ²  \u00a0x\u3000y 🙂👩‍💻 \r\n end ",
    "    def f(x):\n        return x ** 2  # a comment\n\n\n7 8 9 a1b2 _under_score --flag=1",
)


def byte_characters() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes (Radford et al. 2019, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


class BulkEncoder:
    """Texts to ids without a beginning and an end, as the tokenizer that it was made from gives them."""

    def __init__(self, encoding: Any, ids: Ids, tokenizer: Any, missing: re.Pattern[str] | None, added: Sequence[str]) -> None:
        self._encoding, self._ids, self._tokenizer, self._missing, self._added = encoding, ids, tokenizer, missing, added

    def encode(self, text: str) -> Ids:
        """The ids of one text."""
        # bytes without a token, which the tokenizer leaves out as it merges, and added tokens, which it finds in any text
        if (self._missing and self._missing.search(text)) or any(token in text for token in self._added):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        ids: Ids = self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of every text."""
        return [self.encode(text) for text in texts]


def bulk_encoder(tokenizer: Any) -> BulkEncoder | None:
    """The fast form of a `tokenizers.Tokenizer`, or None when it is of another kind. MissingDependency without the extra `corpus`."""
    try:
        import tiktoken
    except ImportError:
        raise MissingDependency("bulk encoding needs tiktoken; install it with: pip install 'llmworks[corpus]'") from None
    state = json.loads(tokenizer.to_str())
    pattern = _pattern(state.get("pre_tokenizer"))
    model = state["model"]
    if pattern is None or model.get("type") != "BPE" or state.get("normalizer") or model.get("unk_token") or model.get("byte_fallback"):
        return None
    characters = byte_characters()

    def as_bytes(token: str) -> bytes | None:
        return bytes(characters[c] for c in token) if all(c in characters for c in token) else None

    vocab: dict[str, int] = model["vocab"]
    absent = {byte for character, byte in characters.items() if character not in vocab}
    missing = _texts_with(absent)
    if missing is None:
        return None
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
    encoding = tiktoken.Encoding("llmworks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encoder = BulkEncoder(encoding, np.array(ids, dtype=np.int32), tokenizer, missing if absent else None, [token["content"] for token in state["added_tokens"]])
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
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and not last.get("use_regex", True):
        found: str | None = step["pattern"].get("Regex")
        return found
    return None


def _texts_with(absent: set[int]) -> re.Pattern[str] | None:
    """What texts hold any of these bytes in UTF-8; None when too many would, since a byte is missing that many characters have."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # no byte of UTF-8
    ascii_, beyond = {b for b in absent if b < 0x80}, {b for b in absent if 0xF1 <= b <= 0xF4}
    if absent - never - ascii_ - beyond:
        return None
    found = "".join(map(re.escape, map(chr, sorted(ascii_)))) + ("\U00040000-\U0010ffff" if beyond else "")
    return re.compile(f"[{found}]" if found else r"(?!)")


def _agrees(encoder: BulkEncoder, reference: Callable[[str], list[int]]) -> bool:
    return all(encoder.encode(text).tolist() == reference(text) for text in PROBE)
