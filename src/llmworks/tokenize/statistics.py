"""Tokenizer statistics: bytes per token and fertility (tokens per word) by group of texts; longest and unused tokens.

Does not access files.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llmworks.core.report import ReportBuilder
from llmworks.core.types import Document

BATCH_SIZE, SCRIPT_CHARACTERS, MAX_ROWS = (
    256,
    400,
    40,
)  # batch size, characters read to detect the script, rows of a table


@dataclass
class TokenCounts:
    """Counts over some texts; words are separated by white space."""

    texts: int = 0
    bytes: int = 0
    words: int = 0
    tokens: int = 0
    lossy: int = 0  # texts that decoding does not restore exactly

    @property
    def bytes_per_token(self) -> float:
        """Compression: bytes of text per token; higher is better."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def fertility(self) -> float:
        """Fertility: tokens per word; lower is better."""
        return self.tokens / self.words if self.words else 0.0

    def add(self, text: str, tokens: int, lossy: bool) -> None:
        """Add one text to the counts."""
        self.texts += 1
        self.bytes += len(text.encode("utf-8", "replace"))
        self.words += len(text.split())
        self.tokens += tokens
        self.lossy += lossy


@dataclass
class TokenizerUsage:
    """Counts over all texts and over each group of texts, and how often each id was used."""

    total: TokenCounts = field(default_factory=TokenCounts)
    groups: dict[str, TokenCounts] = field(default_factory=dict)
    id_counts: Counter[int] = field(default_factory=Counter)


def measure_usage(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> TokenizerUsage:
    """Encode (group, text) pairs and count tokens; special tokens in the text are encoded as plain text."""
    usage = TokenizerUsage()
    batch: list[tuple[str, str]] = []

    def flush() -> None:
        if not batch:
            return
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        for (group, text), ids in zip(batch, encoded, strict=True):
            lossy = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) != text
            for counts in (usage.total, usage.groups.setdefault(group, TokenCounts())):
                counts.add(text, len(ids), lossy)
            usage.id_counts.update(ids)
        batch.clear()

    for item in texts:
        batch.append(item)
        if len(batch) == BATCH_SIZE:
            flush()
    flush()
    return usage


def get_group(document: Document) -> str:
    """Return the group of a document: its language if known, else the script of its first letters."""
    return str(document.metadata.get("language") or detect_script(document.text))


def detect_script(text: str) -> str:
    """Return the most frequent script at the beginning of a text (from Unicode character names); "none" without
    letters.
    """
    names = Counter(
        unicodedata.name(c, "UNKNOWN").replace("-", " ").split(" ")[0].capitalize()
        for c in text[:SCRIPT_CHARACTERS]
        if c.isalpha()
    )
    return names.most_common(1)[0][0] if names else "none"


def report_usage(report: ReportBuilder, tokenizer: Any, usage: TokenizerUsage) -> dict[str, float]:
    """Add tables of the tokenizer statistics to a report; returns the metrics."""
    total, unused_ids = usage.total, find_unused_ids(tokenizer, usage.id_counts)
    figures = {
        "bytes_per_token": round(total.bytes_per_token, 4),
        "tokens_per_word": round(total.fertility, 4),
        "unused_tokens": len(unused_ids),
        "not_round_tripped": total.lossy,
    }
    measured = {"texts": total.texts, "bytes": total.bytes, "tokens": total.tokens}
    report.data |= {
        **measured,
        **figures,
        "groups": {name: round(c.bytes_per_token, 4) for name, c in usage.groups.items()},
    }
    report.add_table("Metrics", ("metric", "value"), [*measured.items(), *figures.items()])
    groups = sorted(usage.groups.items(), key=lambda item: (-item[1].bytes, item[0]))
    report.add_table(
        "By language or script",
        ("group", "texts", "bytes", "bytes per token", "tokens per word", "lossy texts"),
        [(name, c.texts, c.bytes, c.bytes_per_token, c.fertility, c.lossy) for name, c in groups[:MAX_ROWS]],
        note=(
            "Bytes per token are comparable between tokenizers, less so between scripts: a letter takes one byte in"
            " some and three in others."
        ),
    )
    words, signs = find_longest_tokens(tokenizer, usage.id_counts)
    report.add_table(
        "Longest tokens", ("token", "count"), words, note=f"With letters or digits; {signs:,} tokens have none."
    )
    report.add_table(
        "Unused tokens",
        ("id", "token"),
        [(id, repr(decode_token(tokenizer, id))) for id in unused_ids[:MAX_ROWS]],
        note=f"{len(unused_ids):,} in total.",
    )
    return figures


def find_unused_ids(tokenizer: Any, id_counts: Counter[int]) -> list[int]:
    """Return the ids that no text used, except special tokens."""
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [id for id in range(len(tokenizer)) if id not in id_counts and id not in control]


def find_longest_tokens(tokenizer: Any, id_counts: Counter[int]) -> tuple[list[tuple[str, int]], int]:
    """Return ((text, count) of the longest tokens with a letter or digit, number of tokens without one)."""
    texts = [
        (decode_token(tokenizer, id), id_counts[id])
        for id in range(len(tokenizer))
        if id not in tokenizer.added_tokens_decoder
    ]
    words = [item for item in texts if any(c.isalnum() for c in item[0])]
    return [
        (repr(text), times) for text, times in sorted(words, key=lambda item: (-len(item[0]), item[0]))[:MAX_ROWS]
    ], len(texts) - len(words)


def decode_token(tokenizer: Any, id: int) -> str:
    """Decode one token; incomplete UTF-8 bytes become U+FFFD."""
    return str(tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
