"""Tokenize conversations and documents into sequences: one part of the input at a time, written to files that the
packing step memory-maps.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import ROLES, Json, Message, messages_from_json
from llmworks.data.store.parts import Span
from llmworks.data.store.rows import iter_table_rows, read_row_tables
from llmworks.tokenize.chat.encode import ConversationEncoder, LossMask, TokenIds
from llmworks.tokenize.chat.named_templates import Template, set_template
from llmworks.tokenize.chat.templates import TemplateRewritesTurns
from llmworks.tokenize.load import load_tokenizer

NO_TRAINABLE_TOKENS = "no assistant token to train on"


@dataclass(frozen=True)
class TokenizationSettings:
    """Tokenization settings: tokenizer directory, chat template, maximum sequence length, and tokens before and after a
    document.
    """

    tokenizer: Path
    template: Template
    max_length: int
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    control_tokens: str = "text"  # special tokens in message text: text, drop the row, or keep them as control tokens


@dataclass
class TokenizedSequences:
    """Tokenized sequences of one part. `learned` (the loss mask) stays empty for documents: every token counts."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    loss_mask: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    origins: array[int] = field(default_factory=lambda: array("q"))
    rejected: list[Json] = field(default_factory=list)

    def add(self, origin: int, ids: Sequence[int], mask: bytes | bytearray = b"") -> None:
        """Add a sequence; its first token is always masked, since no token of its own precedes it."""
        self.tokens.extend(ids)
        self.lengths.append(len(ids))
        self.origins.append(origin)
        if mask:
            self.loss_mask += mask
            self.loss_mask[-len(mask)] = 0

    def reject(self, origin: int, id: str, reason: str) -> None:
        """Record a rejected row."""
        self.rejected.append({"row": origin, "id": id, "reason": reason})

    def write(self, folder: Path) -> None:
        """Write the arrays, and the rejected rows."""
        import numpy as np

        for name, values, kind in (
            ("tokens", self.tokens, np.uint32),
            ("lengths", self.lengths, np.int64),
            ("origins", self.origins, np.int64),
            ("learned", self.loss_mask, np.uint8),
        ):
            np.save(
                folder / f"{name}.npy", np.frombuffer(values, dtype=kind) if len(values) else np.zeros(0, dtype=kind)
            )
        if self.rejected:
            (folder / "rejected.jsonl").write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rejected), encoding="utf-8"
            )


@functools.lru_cache(maxsize=1)
def _encoder(settings: TokenizationSettings) -> ConversationEncoder:
    """Load the encoder, once in each worker."""
    tokenizer = load_tokenizer(settings.tokenizer)
    set_template(tokenizer, settings.template, settings.control_tokens)
    return ConversationEncoder(tokenizer, frozen=True, strict=settings.control_tokens == "drop")


def _encode_plain(encoder: ConversationEncoder, row: PlainConversation) -> list[tuple[TokenIds, LossMask]]:
    try:
        return [encoder.encode_plain(row.roles, row.contents)]
    except TemplateRewritesTurns:
        return encoder.encode_answers(
            [Message(role, content) for role, content in zip(row.roles, row.contents, strict=True)]
        )


def encode_chats(settings: TokenizationSettings, part: Span, folder: Path) -> Json:
    """Tokenize one part of a dataset of conversations.

    A row that is too long, has no trainable token, or fails to render is rejected, never truncated. So is
    one with a special token in message text, where `settings` say so.
    """
    encoder = _encoder(settings)
    sequences = TokenizedSequences()
    uses: set[str] = set()
    origin = part.row
    for table in read_row_tables(part.file, "chat", part.first, part.last):
        for row in _iter_rows(table):
            try:
                if isinstance(row, PlainConversation):
                    uses |= _template_features(row.roles)
                    pieces = _encode_plain(encoder, row)
                else:
                    messages = messages_from_json(row["messages"])
                    uses |= _template_features(tuple(m.role for m in messages)) | (
                        {"tools"} if row["tools"] or any(m.tool_calls for m in messages) else set()
                    )
                    pieces = encoder.encode_answers(messages, row["tools"])
                longest = max((len(ids) for ids, _ in pieces), default=0)
                reason = (
                    f"longer than max_length ({longest} tokens)"
                    if longest > settings.max_length
                    else NO_TRAINABLE_TOKENS
                    if not pieces or any(mask.find(1, 1) < 0 for _, mask in pieces)
                    else ""
                )
            except (RequestError, ModelError, ValueError) as error:
                pieces, reason = [], str(error)
            if reason:
                sequences.reject(origin, row.id if isinstance(row, PlainConversation) else row["id"], reason)
            else:
                for ids, mask in pieces:
                    sequences.add(origin, ids, mask)
            origin += 1
    sequences.write(folder)
    return {
        "pieces": len(sequences.lengths),
        "tokens": len(sequences.tokens),
        "rejected": len(sequences.rejected),
        "largest": max(sequences.tokens, default=0),
        "uses": dict.fromkeys(sorted(uses), 1),
    }


def encode_documents(settings: TokenizationSettings, part: Span, folder: Path) -> Json:
    """Tokenize one part of a dataset of documents; long documents are split.

    Control tokens in the text are encoded as plain text.
    """
    encoder = _encoder(settings)
    sequences = TokenizedSequences()
    for origin, document in enumerate(part.documents(), part.row):
        ids = [*settings.prefix_ids, *encoder.encode_document(document.text), *settings.suffix_ids]
        if len(ids) == len(settings.prefix_ids) + len(settings.suffix_ids):
            sequences.reject(origin, document.id, "empty")
            continue
        sequences.add(origin, ids[: settings.max_length])
        for start in range(
            settings.max_length - 1, len(ids) - 1, settings.max_length - 1
        ):  # chunks overlap by one token, masked in the second, so that no token is lost from the loss
            sequences.add(origin, ids[start : start + settings.max_length])
    sequences.write(folder)
    return {
        "pieces": len(sequences.lengths),
        "tokens": len(sequences.tokens),
        "rejected": len(sequences.rejected),
        "largest": max(sequences.tokens, default=0),
    }


class PlainConversation(NamedTuple):
    """A conversation that has only roles and contents."""

    id: str
    roles: tuple[str, ...]
    contents: list[str]


@functools.cache
def _has_known_roles(roles: tuple[str, ...]) -> bool:
    return set(roles).issubset(ROLES)


@functools.cache
def _template_features(roles: tuple[str, ...]) -> set[str]:
    return (
        ({"system"} if "system" in roles else set())
        | ({"results"} if "tool" in roles else set())
        | ({"turns"} if roles.count("assistant") > 1 else set())
    )


def _iter_rows(table: Any) -> Iterator[PlainConversation | Json]:
    """Yield a table's rows; rows without tools, calls, names and weights are read by columns, which is much faster."""
    import numpy as np

    for batch in table.to_batches():
        column = batch.column("messages")
        offsets = column.offsets.to_numpy()
        turns = column.values
        odd = np.zeros(len(turns) + 1, dtype=np.int64)
        for name in ("tool_calls", "tool_call_id", "name", "weight", "extra"):
            if name in [turns.type.field(i).name for i in range(turns.type.num_fields)]:
                odd[1:] |= turns.field(name).is_valid().to_numpy(zero_copy_only=False)
        odd[1:] |= turns.field("content").is_null().to_numpy(zero_copy_only=False) | turns.field(
            "role"
        ).is_null().to_numpy(zero_copy_only=False)
        before = np.cumsum(odd)
        # other roles are left to the row reader, which maps aliases and rejects the rest
        plain = (
            (before[offsets[1:]] == before[offsets[:-1]])
            & (batch.column("tools").to_numpy(zero_copy_only=False) == "[]")
            & (offsets[1:] > offsets[:-1])
        )
        roles, contents, ids = (
            turns.field("role").to_pylist(),
            turns.field("content").to_pylist(),
            batch.column("id").to_pylist(),
        )
        bounds = offsets.tolist()
        for i, simple in enumerate(plain.tolist()):
            turns_of = tuple(roles[bounds[i] : bounds[i + 1]])
            if simple and _has_known_roles(turns_of):
                yield PlainConversation(ids[i], turns_of, contents[bounds[i] : bounds[i + 1]])
            else:
                yield next(iter_table_rows(batch.slice(i, 1), "chat"))
