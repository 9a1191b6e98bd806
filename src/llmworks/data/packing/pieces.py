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
from llmworks.core.types import ROLES, Json, messages_from_json
from llmworks.data.store.parts import Span
from llmworks.data.store.rows import row_tables, table_rows
from llmworks.tokenize.chat.encode import ConversationEncoder
from llmworks.tokenize.chat.named import Template, use_template
from llmworks.tokenize.load import load_tokenizer

NOTHING = "no assistant token to train on"


@dataclass(frozen=True)
class How:
    """Tokenization settings: tokenizer directory, chat template, maximum sequence length, and tokens before and after a
    document.
    """

    tokenizer: Path
    template: Template
    longest: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    control: bool = False  # whether control tokens are allowed in message content


@dataclass
class Pieces:
    """Tokenized sequences of one part. `learned` (the loss mask) stays empty for documents: every token counts."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    learned: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    origins: array[int] = field(default_factory=lambda: array("q"))
    rejected: list[Json] = field(default_factory=list)

    def add(self, origin: int, ids: Sequence[int], mask: bytes | bytearray = b"") -> None:
        """Add a sequence; its first token is always masked, since no token of its own precedes it."""
        self.tokens.extend(ids)
        self.lengths.append(len(ids))
        self.origins.append(origin)
        if mask:
            self.learned += mask
            self.learned[-len(mask)] = 0

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
            ("learned", self.learned, np.uint8),
        ):
            np.save(
                folder / f"{name}.npy", np.frombuffer(values, dtype=kind) if len(values) else np.zeros(0, dtype=kind)
            )
        if self.rejected:
            (folder / "rejected.jsonl").write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rejected), encoding="utf-8"
            )


@functools.lru_cache(maxsize=1)
def _encoder(how: How) -> ConversationEncoder:
    """Load the encoder, once in each worker."""
    tokenizer = load_tokenizer(how.tokenizer)
    use_template(tokenizer, how.template)
    return ConversationEncoder(tokenizer, frozen=True, strict=not how.control)


def encode_chats(how: How, part: Span, folder: Path) -> Json:
    """Tokenize one part of a dataset of conversations.

    A row that is too long, has no trainable token, or fails to render is rejected, never truncated.

    So is one with a control token in message content, unless `how` allows it.
    """
    encoder = _encoder(how)
    pieces = Pieces()
    uses: set[str] = set()
    origin = part.row
    for table in row_tables(part.file, "chat", part.first, part.last):
        for row in _rows(table):
            try:
                if isinstance(row, Plain):
                    uses |= _uses(row.roles)
                    ids, mask = encoder.encode_plain(row.roles, row.contents)
                else:
                    messages = messages_from_json(row["messages"])
                    uses |= _uses(tuple(m.role for m in messages)) | (
                        {"tools"} if row["tools"] or any(m.tool_calls for m in messages) else set()
                    )
                    ids, mask = encoder.encode(messages, row["tools"])
                reason = (
                    f"longer than max_length ({len(ids)} tokens)"
                    if len(ids) > how.longest
                    else NOTHING
                    if mask.find(1, 1) < 0
                    else ""
                )
            except (RequestError, ModelError, ValueError) as error:
                ids, mask, reason = [], b"", str(error)
            if reason:
                pieces.reject(origin, row.id if isinstance(row, Plain) else row["id"], reason)
            else:
                pieces.add(origin, ids, mask)
            origin += 1
    pieces.write(folder)
    return {
        "pieces": len(pieces.lengths),
        "tokens": len(pieces.tokens),
        "rejected": len(pieces.rejected),
        "largest": max(pieces.tokens, default=0),
        "uses": dict.fromkeys(sorted(uses), 1),
    }


def encode_documents(how: How, part: Span, folder: Path) -> Json:
    """Tokenize one part of a dataset of documents; long documents are split.

    Control tokens in the text are encoded as plain text.
    """
    encoder = _encoder(how)
    pieces = Pieces()
    for origin, document in enumerate(part.documents(), part.row):
        ids = [*how.before, *encoder.text(document.text), *how.after]
        if len(ids) == len(how.before) + len(how.after):
            pieces.reject(origin, document.id, "empty")
            continue
        pieces.add(origin, ids[: how.longest])
        for start in range(
            how.longest - 1, len(ids) - 1, how.longest - 1
        ):  # chunks overlap by one token, masked in the second, so that no token is lost from the loss
            pieces.add(origin, ids[start : start + how.longest])
    pieces.write(folder)
    return {
        "pieces": len(pieces.lengths),
        "tokens": len(pieces.tokens),
        "rejected": len(pieces.rejected),
        "largest": max(pieces.tokens, default=0),
    }


class Plain(NamedTuple):
    """A conversation that has only roles and contents."""

    id: str
    roles: tuple[str, ...]
    contents: list[str]


@functools.cache
def _known(roles: tuple[str, ...]) -> bool:
    return set(roles).issubset(ROLES)


@functools.cache
def _uses(roles: tuple[str, ...]) -> set[str]:
    return (
        ({"system"} if "system" in roles else set())
        | ({"results"} if "tool" in roles else set())
        | ({"turns"} if roles.count("assistant") > 1 else set())
    )


def _rows(table: Any) -> Iterator[Plain | Json]:
    """Yield a table's rows; rows without tools, calls, names and weights are read by columns, which is much faster."""
    import numpy as np

    for batch in table.to_batches():
        column = batch.column("messages")
        offsets = column.offsets.to_numpy()
        turns = column.values
        odd = np.zeros(len(turns) + 1, dtype=np.int64)
        for name in ("tool_calls", "tool_call_id", "name", "weight"):
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
            if simple and _known(turns_of):
                yield Plain(ids[i], turns_of, contents[bounds[i] : bounds[i + 1]])
            else:
                yield next(table_rows(batch.slice(i, 1), "chat"))
