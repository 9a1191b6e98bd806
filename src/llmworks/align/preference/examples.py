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
from llmworks.tokenize.chat.templates import for_template, render_masked

EMPTY = "the {side} side is empty"


@dataclass(frozen=True)
class Answer:
    """A completion that continues a prompt: token ids and a loss mask of the same length (1: label token)."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """The number of label tokens."""
        return sum(self.mask)


@dataclass(frozen=True)
class Answered:
    """A prompt and its completions.

    `prompt` is the prefix that all completions share before their first label token, so that it is computed once.
    """

    id: str
    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    good: bool = True  # of a single completion: whether it is desirable
    margin: float = 0.0  # of a pair: score margin of the first completion

    @property
    def ids(self) -> tuple[int, ...]:
        """All input tokens."""
        return (*self.prompt, *(i for answer in self.answers for i in answer.ids))

    @property
    def labels(self) -> int:
        """The number of label tokens."""
        return sum(answer.tokens for answer in self.answers)


def answered(
    tokenizer: Any,
    id: str,
    prompt: Sequence[Message],
    sides: Mapping[str, Sequence[Message]],
    tools: Sequence[Any],
    *,
    most: int,
    cut: bool = False,
) -> Answered | str:
    """Tokenize a prompt and the completions `sides` with the chat template; return the reason where it cannot be used.

    `most`: longest prompt plus completion in tokens; `cut`: truncate longer ones at the end.
    """
    found: list[Answer] = []
    for side, messages in sides.items():
        if not any(m.role == "assistant" and (m.content.strip() or m.tool_calls) for m in messages):
            return EMPTY.format(side=side)
        try:
            turns, shown = for_template(tokenizer, (*(replace(m, weight=0) for m in prompt), *messages), tools)
            rendered = render_masked(tokenizer, turns, tools=shown)
        except (RequestError, ModelError, ValueError) as error:
            return str(error)
        last = max(
            (i for i, m in enumerate(rendered.mask) if m), default=-1
        )  # tokens after the last label token are dropped
        if last < 1:
            return EMPTY.format(side=side)
        found.append(Answer(rendered.ids[: last + 1], rendered.mask[: last + 1]))
    begins = min(answer.mask.index(1) for answer in found)
    longest = max(len(answer.ids) for answer in found)
    if longest > most and not cut:
        return f"{longest} tokens, longer than max_length {most}"
    found = [Answer(answer.ids[:most], answer.mask[:most]) for answer in found]
    if not all(answer.tokens for answer in found):
        return f"the prompt alone has {begins} tokens, max_length is {most}"
    if len(found) > 1 and all(answer == found[0] for answer in found):
        return "both sides are equal" + (" after truncation" if longest > most else "")
    shared = min(begins, len(os.path.commonprefix([answer.ids for answer in found])))
    return Answered(
        id, found[0].ids[:shared], tuple(Answer(answer.ids[shared:], answer.mask[shared:]) for answer in found)
    )


def pair_of(tokenizer: Any, row: Row, most: int, *, cut: bool = False) -> Answered | str:
    """Tokenize a preference row: two completions, the chosen one first."""
    try:
        prompt, sides = (
            messages_from_json(row["prompt"]),
            {side: messages_from_json(row[side]) for side in ("chosen", "rejected")},
        )
    except ValueError as error:
        return str(error)
    made = answered(tokenizer, str(row["id"]), prompt, sides, row.get("tools") or (), most=most, cut=cut)
    return made if isinstance(made, str) else replace(made, margin=margin_of(row))


def margin_of(row: Row) -> float:
    """Return the score margin of a pair from its row (`margin`, or two `scores`); 0 where it has none."""
    extra = row.get("extra") or {}
    fields = {**(extra.get("fields") or {}), **extra}
    margin, scores = fields.get("margin"), fields.get("scores")
    if _number(margin):
        return float(margin)
    return (
        float(scores[0]) - float(scores[1])
        if isinstance(scores, (list, tuple)) and len(scores) == 2 and all(map(_number, scores))
        else 0.0
    )


def _number(value: object) -> TypeGuard[float]:
    """Return whether the value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def singles_of(tokenizer: Any, row: Row, most: int, *, cut: bool = False) -> list[Answered | str]:
    """Tokenize a row into single completions.

    A pair gives two, a desirable and an undesirable one; a conversation gives its last message, by its field `label`.
    """
    if "chosen" in row:
        pair = pair_of(tokenizer, row, most, cut=cut)
        if isinstance(pair, str):
            return [pair]
        return [
            replace(pair, id=f"{pair.id}:{side}", answers=(answer,), good=side == "chosen")
            for side, answer in zip(("chosen", "rejected"), pair.answers, strict=True)
        ]
    label = label_of(row)
    if label is None:
        return ["has no `label` (true or false, or 1 or 0) of whether its completion is desirable"]
    try:
        messages = messages_from_json(row["messages"])
    except ValueError as error:
        return [str(error)]
    made = answered(
        tokenizer, str(row["id"]), messages[:-1], {"only": messages[-1:]}, row.get("tools") or (), most=most, cut=cut
    )
    return [made if isinstance(made, str) else replace(made, good=label)]


def label_of(row: Row) -> bool | None:
    """Return the label of a conversation's row; None where it has none."""
    extra = row.get("extra") or {}
    label = row.get("label", extra.get("label", (extra.get("fields") or {}).get("label")))
    return bool(label) if isinstance(label, bool) or label in (0, 1) else None


def kept(made: Sequence[tuple[str, Answered | str]], name: str) -> tuple[list[Answered], list[tuple[str, str]]]:
    """Return (examples, rejected rows as (id, reason)).

    Errors: DataError when no example is left.
    """
    good = [example for _, example in made if not isinstance(example, str)]
    lost = [(id, example) for id, example in made if isinstance(example, str)]
    if not good:
        raise DataError(f"{name}: none of {len(made)} rows can be used; the first: {lost[0][1] if lost else 'no rows'}")
    return apart(good), lost


def apart(examples: Sequence[Answered], mark: str = "") -> list[Answered]:
    """Return the examples with unique ids, since reference log-probabilities are stored by id.

    `mark` is appended to every id.
    """
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        seen[example.id] += 1
        found.append(
            replace(example, id=example.id + (f" ({seen[example.id]})" if seen[example.id] > 1 else "") + mark)
        )
    return found
