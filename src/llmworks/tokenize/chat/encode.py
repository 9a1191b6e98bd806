"""Bulk encoding of conversations to token ids with a loss mask: the result of `templates.render_masked`, but faster.

Used for packing and for pages of chats; `train.sft`, whose rows are fewer, calls `render_masked` itself
(`data/conversations/training_rows.py`).

A template that only inserts the contents is not run for every conversation, and with a tokenizer that
`build_bulk_encoder` supports only the contents are encoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import MissingDependency, RequestError
from llmworks.core.types import Json, Message
from llmworks.tokenize.bpe.bulk_encoder import BulkEncoder, build_bulk_encoder
from llmworks.tokenize.chat.special_tokens import SpecialTokenDetector, get_escaper
from llmworks.tokenize.chat.template_cache import SLOT, TRIM, SkeletonCache, TurnPattern, get_pattern
from llmworks.tokenize.chat.templates import (
    TemplateRewritesTurns,
    adapt_tools,
    can_render_tools,
    encode,
    flatten_tools,
    render_answers,
    render_masked,
)

TokenIds = list[int]
LossMask = bytearray | bytes  # loss mask: 1 for label tokens


@dataclass(frozen=True)
class FixedSegment:
    """Ids that are the same in every conversation of a pattern, and their loss mask."""

    ids: TokenIds
    mask: bytes


@dataclass(frozen=True)
class ContentSegment:
    """Template text around message contents: pieces that are text, or (turn, function that trims its content)."""

    pieces: tuple[str | tuple[int, Callable[[str], str]], ...]
    mask: bytes  # loss mask of one token

    def render(self, contents: Sequence[str]) -> str:
        """Fill in the contents."""
        return "".join([p if isinstance(p, str) else p[1](contents[p[0]]) for p in self.pieces])


class ConversationEncoder:
    """Encoder of conversations with a tokenizer's own chat template.

    `fast=False` always runs the template itself; `frozen` fixes the dates that some templates insert, so that results
    do not depend on the day; `strict` rejects special tokens in message text, which are encoded as text otherwise.
    """

    def __init__(self, tokenizer: Any, *, fast: bool = True, frozen: bool = False, strict: bool = False) -> None:
        self._tokenizer, self._frozen, self._strict = tokenizer, frozen, strict
        escaper = get_escaper(tokenizer)
        self._control = SpecialTokenDetector(tokenizer) if strict or escaper is not None else None
        self._can_render_tools: bool | None = None
        self._template_cache = SkeletonCache(tokenizer, frozen=frozen) if fast else None
        self._bulk = _build_bulk(tokenizer) if fast else None
        self._separators = _compile_separators(tokenizer)
        self._plans: dict[TurnPattern, list[FixedSegment | ContentSegment] | None] = {}

    def encode(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> tuple[TokenIds, LossMask]:
        """Encode a conversation to (ids, loss mask).

        Tools are written into the text where the template would drop them.
        Errors: ModelError and RequestError as in `render_masked`.
        """
        if self._bulk is None or tools or any(m.tool_calls for m in messages):
            self._check(messages, tools)
        if tools or any(m.tool_calls for m in messages):
            if self._can_render_tools is None:
                self._can_render_tools = can_render_tools(self._tokenizer)
            if not self._can_render_tools:
                messages, tools = flatten_tools(messages, tools), ()
        pattern = None if tools or self._template_cache is None else get_pattern(messages)
        plan = self._get_plan(pattern, messages) if pattern else None
        contents = [m.content for m in messages]
        if plan is not None and self._control is not None and any(map(self._control.find_in_text, contents)):
            plan = None
        if plan is not None and (done := self._fill_plan(plan, contents)) is not None:
            return done
        self._check(messages)
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        rendered = render_masked(self._tokenizer, messages, tools=wrapped, frozen=self._frozen)
        return list(rendered.ids), bytes(rendered.mask)

    def encode_answers(
        self, messages: Sequence[Message], tools: Sequence[Json] = ()
    ) -> list[tuple[TokenIds, LossMask]]:
        """Encode a conversation for training: one (ids, loss mask), or several (`render_answers`)."""
        try:
            return [self.encode(messages, tools)]
        except TemplateRewritesTurns:
            shown, offered = adapt_tools(self._tokenizer, messages, tools)
            rendered = render_answers(self._tokenizer, shown, tools=offered, frozen=self._frozen)
            return [(list(one.ids), bytes(one.mask)) for one in rendered]

    def encode_plain(self, roles: Sequence[str], contents: Sequence[str]) -> tuple[TokenIds, LossMask]:
        """Encode turns that have only a role (one of `types.ROLES`) and a content, with all answers trained on."""
        if self._template_cache is not None:
            pattern = tuple(
                [(role, 1, content != "", bool(content.strip())) for role, content in zip(roles, contents, strict=True)]
            )
            plan = self._plans.get(pattern)
            if plan is not None and self._bulk is not None and (done := self._fill_plan(plan, contents)) is not None:
                return done
        return self.encode([Message(role, content) for role, content in zip(roles, contents, strict=True)])

    def _check(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> None:
        """Raise RequestError for a special token in message text.

        Text that the bulk encoder takes contains no added token, so it needs no check.
        """
        if self._strict and self._control is not None:
            found = next(
                (
                    tokens
                    for tokens in (self._control.find_in_tools(tools), *map(self._control.find_in_turn, messages))
                    if tokens
                ),
                None,
            )
            if found:
                raise RequestError(f"a special token in the text ({found[0]})")

    def encode_document(self, text: str) -> TokenIds:
        """Encode a document: no special tokens are added, and those in its text are encoded as plain text."""
        if self._bulk is not None and not self._bulk.has_added_token(text):
            return self._bulk.encode_ordinary(text)
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _fill_plan(
        self, plan: Sequence[FixedSegment | ContentSegment], contents: Sequence[str]
    ) -> tuple[TokenIds, LossMask] | None:
        ids: TokenIds = []
        mask = bytearray()
        for piece in plan:
            if isinstance(piece, FixedSegment):
                ids += piece.ids
                mask += piece.mask
                continue
            text = piece.render(contents)
            if self._bulk is None:
                new = list(encode(self._tokenizer, text))
            elif self._bulk.has_added_token(text):
                return None  # an added token may span the border to ids that were encoded separately
            else:
                new = self._bulk.encode_ordinary(text)
            ids += new
            mask += piece.mask * len(new)
        return ids, mask

    def _get_plan(
        self, pattern: TurnPattern, messages: Sequence[Message]
    ) -> list[FixedSegment | ContentSegment] | None:
        if pattern not in self._plans:
            assert self._template_cache is not None
            found = self._template_cache.get_segments(pattern, lambda: messages)
            self._plans[pattern] = (
                None
                if found is None
                else [piece for text, learned in found for piece in self._split_segment(text, learned)]
            )
        return self._plans[pattern]

    def _split_segment(self, text: str, mask_value: int) -> list[FixedSegment | ContentSegment]:
        """Split a segment at the template's special tokens, where these always separate the encoding."""
        parts = self._separators.split(text) if self._separators and self._bulk else [text]
        found: list[FixedSegment | ContentSegment] = []
        for part in filter(None, parts):
            if SLOT.search(part) is None:
                ids = list(encode(self._tokenizer, part))
                found.append(FixedSegment(ids, bytes([mask_value]) * len(ids)))
            else:
                text_turn_trim = SLOT.split(part)
                pieces: list[str | tuple[int, Callable[[str], str]]] = []
                for at in range(0, len(text_turn_trim), 3):
                    pieces += [
                        text_turn_trim[at],
                        *(
                            [(int(text_turn_trim[at + 1]), TRIM[text_turn_trim[at + 2]])]
                            if at + 1 < len(text_turn_trim)
                            else []
                        ),
                    ]
                found.append(ContentSegment(tuple(p for p in pieces if p != ""), bytes([mask_value])))
        return found


def _build_bulk(tokenizer: Any) -> BulkEncoder | None:
    backend = getattr(tokenizer, "_tokenizer", None)
    try:
        return build_bulk_encoder(backend) if backend is not None else None
    except MissingDependency:
        return None  # slower, with the same ids


def _compile_separators(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a regex of the added tokens if they always separate text; None if some strip white space or overlap."""
    known = list(tokenizer.added_tokens_decoder.values())
    added = {str(t.content) for t in known}
    begins = {token[:end] for token in added for end in range(1, len(token))}
    overlap = any(token[start:] in begins for token in added for start in range(1, len(token)))
    within = any(
        token[start:end] in added
        for token in added
        for start in range(len(token))
        for end in range(start + 1, len(token) + 1)
        if end - start < len(token)
    )
    if not added or overlap or within or any(t.lstrip or t.rstrip or t.single_word for t in known):
        return None
    return re.compile("(" + "|".join(map(re.escape, sorted(added))) + ")")
