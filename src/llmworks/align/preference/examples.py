"""Prompts with completions as token ids: tokenization, loss masks and the shared prompt prefix.

Torch-free.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.core.types import Message, messages_from_json
from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.templates import RenderedConversation, adapt_tools, render_answers

EMPTY = "the {side} side is empty"


@dataclass(frozen=True)
class CompletionTokens:
    """A completion that continues a prompt: token ids and a loss mask of the same length (1: label token)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    @property
    def num_label_tokens(self) -> int:
        """The number of label tokens."""
        return sum(self.mask)


@dataclass(frozen=True)
class PromptCompletions:
    """A prompt and its completions.

    `prompt` is the prefix that all completions share before their first label token, so that it is computed once.
    """

    id: str
    prompt: tuple[int, ...]
    completions: tuple[CompletionTokens, ...]
    desirable: bool = True  # of a single completion: whether it is desirable
    margin: float = 0.0  # of a pair: score margin of the first completion

    @property
    def ids(self) -> tuple[int, ...]:
        """All input tokens."""
        return (*self.prompt, *(i for answer in self.completions for i in answer.ids))

    @property
    def labels(self) -> int:
        """The number of label tokens."""
        return sum(answer.num_label_tokens for answer in self.completions)


def tokenize_completions(
    tokenizer: Any,
    id: str,
    prompt: Sequence[Message],
    completions: Mapping[str, Sequence[Message]],
    tools: Sequence[Any],
    *,
    max_length: int,
    truncate: bool = False,
) -> PromptCompletions | str:
    """Tokenize a prompt and the `completions` with the chat template; return the reason where it cannot be used.

    `max_length`: longest prompt plus completion in tokens; `truncate`: truncate longer ones at the end.
    """
    tokenized: list[CompletionTokens] = []
    for side, messages in completions.items():
        if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in messages):
            return EMPTY.format(side=side)
        try:
            turns, template_tools = adapt_tools(tokenizer, (*(replace(m, weight=0) for m in prompt), *messages), tools)
            rendered = render_answers(tokenizer, turns, tools=template_tools)
        except (RequestError, ModelError, ValueError) as error:
            return str(error)
        if len(rendered) > 1:
            return f"the chat template rewrites earlier turns, and the {side} side has several answers"
        answer = rendered[-1] if rendered else RenderedConversation((), ())
        last = max((i for i, m in enumerate(answer.mask) if m), default=-1)  # tokens after the last label are dropped
        if last < 1:
            return EMPTY.format(side=side)
        tokenized.append(CompletionTokens(answer.ids[: last + 1], answer.mask[: last + 1]))
    prompt_length = min(answer.mask.index(1) for answer in tokenized)
    longest = max(len(answer.ids) for answer in tokenized)
    if longest > max_length and not truncate:
        return f"{longest} tokens, longer than max_length {max_length}"
    tokenized = [CompletionTokens(answer.ids[:max_length], answer.mask[:max_length]) for answer in tokenized]
    if not all(answer.num_label_tokens for answer in tokenized):
        return f"the prompt alone has {prompt_length} tokens, max_length is {max_length}"
    if len(tokenized) > 1 and all(answer == tokenized[0] for answer in tokenized):
        return "both sides are equal" + (" after truncation" if longest > max_length else "")
    shared = min(prompt_length, len(os.path.commonprefix([answer.ids for answer in tokenized])))
    return PromptCompletions(
        id,
        tokenized[0].ids[:shared],
        tuple(CompletionTokens(answer.ids[shared:], answer.mask[shared:]) for answer in tokenized),
    )


def tokenize_pair(tokenizer: Any, row: Row, max_length: int, *, truncate: bool = False) -> PromptCompletions | str:
    """Tokenize a preference row: two completions, the chosen one first."""
    try:
        prompt, sides = (
            messages_from_json(row["prompt"]),
            {side: messages_from_json(row[side]) for side in ("chosen", "rejected")},
        )
    except ValueError as error:
        return str(error)
    example = tokenize_completions(
        tokenizer, str(row["id"]), prompt, sides, row.get("tools") or (), max_length=max_length, truncate=truncate
    )
    return example if isinstance(example, str) else replace(example, margin=get_margin(row))


def get_margin(row: Row) -> float:
    """Return the score margin of a pair from its row (`margin`, or two `scores`); 0 where it has none."""
    extra = row.get("extra") or {}
    fields = {**(extra.get("fields") or {}), **extra}
    margin, scores = fields.get("margin"), fields.get("scores")
    if _is_finite_number(margin):
        return float(margin)
    return (
        float(scores[0]) - float(scores[1])
        if isinstance(scores, (list, tuple)) and len(scores) == 2 and all(map(_is_finite_number, scores))
        else 0.0
    )


def _is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def tokenize_singles(
    tokenizer: Any, row: Row, max_length: int, *, truncate: bool = False
) -> list[PromptCompletions | str]:
    """Tokenize a row into single completions.

    A pair gives two, a desirable and an undesirable one; a conversation gives its last message, by its field `label`.
    """
    if "chosen" in row:
        pair = tokenize_pair(tokenizer, row, max_length, truncate=truncate)
        if isinstance(pair, str):
            return [pair]
        return [
            replace(pair, id=f"{pair.id}:{side}", completions=(answer,), desirable=side == "chosen")
            for side, answer in zip(("chosen", "rejected"), pair.completions, strict=True)
        ]
    label = get_label(row)
    if label is None:
        return ["has no `label` (true or false, or 1 or 0) of whether its completion is desirable"]
    try:
        messages = messages_from_json(row["messages"])
    except ValueError as error:
        return [str(error)]
    example = tokenize_completions(
        tokenizer,
        str(row["id"]),
        messages[:-1],
        {"only": messages[-1:]},
        row.get("tools") or (),
        max_length=max_length,
        truncate=truncate,
    )
    return [example if isinstance(example, str) else replace(example, desirable=label)]


def get_label(row: Row) -> bool | None:
    """Return the label of a conversation's row; None where it has none."""
    extra = row.get("extra") or {}
    label = row.get("label", extra.get("label", (extra.get("fields") or {}).get("label")))
    return bool(label) if isinstance(label, bool) or label in (0, 1) else None


def split_rejected(
    results: Sequence[tuple[str, PromptCompletions | str]], name: str
) -> tuple[list[PromptCompletions], list[tuple[str, str]]]:
    """Return (examples, rejected rows as (id, reason)).

    Errors: DataError when no example is left.
    """
    examples = [example for _, example in results if not isinstance(example, str)]
    rejected = [(id, example) for id, example in results if isinstance(example, str)]
    if not examples:
        raise DataError(
            f"{name}: none of {len(results)} rows can be used; the first: {rejected[0][1] if rejected else 'no rows'}"
        )
    return make_ids_unique(examples), rejected


def make_ids_unique(examples: Sequence[PromptCompletions], id_suffix: str = "") -> list[PromptCompletions]:
    """Return the examples with unique ids, since reference log-probabilities are stored by id.

    `id_suffix` is appended to every id.
    """
    counts: Counter[str] = Counter()
    renamed = []
    for example in examples:
        counts[example.id] += 1
        renamed.append(
            replace(example, id=example.id + (f" ({counts[example.id]})" if counts[example.id] > 1 else "") + id_suffix)
        )
    return renamed
