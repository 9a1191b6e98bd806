"""Stage `synthesize.reason`: STaR (Zelikman et al. 2022): chain-of-thought answers, kept where they reach the known
answer.

A question that is never answered correctly is retried once with the answer as a hint (rationalization); the hint is
not kept in the row.
"""

from __future__ import annotations

import re

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.text.words import count_words
from llmworks.core.types import Message
from llmworks.data.store.rows import Row
from llmworks.score.key import get_accepted_keys, key
from llmworks.synthesize.builder import (
    Decoding,
    GenerationPrompt,
    SyntheticDatasetBuilder,
    read_prompts,
    replace_answer,
)

REASONING_PROMPT = "\n\nThink step by step. End with a line that says `Answer:` and the answer alone."
HINT_PROMPT = (
    "\n\nThe right answer is: {0}. Explain step by step how one gets there, as if you had not been told. End with a"
    " line that says `Answer:` and the answer alone."
)
HINT_MENTION = re.compile(
    r"\b(?:hint|was told|were told|as given|given that the (?:right |correct )?answer|we (?:already )?know (?:that"
    r" )?the answer|the right answer is (?:given|said))\b",
    re.IGNORECASE,
)


class ReasonConfig(Config):
    """Number of attempts, hint and filter of reasoning."""

    max_attempts: int = Field(2, ge=1, le=64, description="completions sampled per question until one is correct")
    use_hint: bool = Field(True, description="retry once more with the correct answer as a hint (rationalization)")
    min_words: int = Field(12, ge=0, description="shortest reasoning in words; shorter ones only state the answer")
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    decoding: Decoding = Field(Decoding(), description="sampling parameters")


def reason(config: ReasonConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Generate answers with reasoning for conversations whose `answer` is a key.

    The row keeps its own question, without the reasoning instruction.

    Errors: DataError for rows without a key, or when no row is kept.
    """
    todo = read_prompts(data, config.limit)
    for row, _ in todo:
        get_accepted_keys(row)
    last: dict[str, str] = {}
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.reason") as builder:
        for turn in range(config.max_attempts + config.use_hint):
            if not todo:
                break
            hinted = turn == config.max_attempts
            prompts = [
                GenerationPrompt(
                    _append_to_last_turn(
                        turns, HINT_PROMPT.format(get_accepted_keys(row)[0]) if hinted else REASONING_PROMPT
                    ),
                    turn,
                )
                for row, turns in todo
            ]
            left: list[tuple[Row, tuple[Message, ...]]] = []
            for (row, turns), prompt, answer in zip(
                todo,
                prompts,
                builder.generate("with hint" if hinted else f"attempt {turn + 1}", prompts),
                strict=True,
            ):
                problem = (
                    answer.problem or find_problem(config, answer.text, hinted) or key(turns, answer.text, row).reason
                )
                if problem:
                    last[row["id"]] = f"{problem}\n{answer.text}"
                    left.append((row, turns))
                    continue
                builder.rows.append(
                    builder.build_row(
                        row["id"],
                        [prompt],
                        group=row["group"],
                        answer=row["answer"],
                        source=row,
                        messages=replace_answer(row, Message("assistant", answer.text)),
                        tries=turn + 1,
                        hinted=hinted,
                    )
                )
            todo = left
        for row, _ in todo:
            problem, _, text = last[row["id"]].partition("\n")
            builder.reject(row["id"], "wrong in every attempt" if problem.startswith("answered") else problem, text)
        if not builder.rows:
            raise DataError(f"{data.name}: {model.name} never reached a known answer")
        hinted_rows = sum(row["extra"]["fields"]["made_by"]["hinted"] for row in builder.rows)
        return builder.finish([data], metrics={"hinted": hinted_rows}, note=f"{hinted_rows:,} with a hint")


def _append_to_last_turn(turns: tuple[Message, ...], words: str) -> tuple[Message, ...]:
    """Append words to the last turn of a conversation."""
    return (*turns[:-1], Message("user", turns[-1].content + words))


def find_problem(config: ReasonConfig, text: str, hinted: bool) -> str:
    """Return why a reasoning is rejected, or an empty string."""
    if count_words(text) < config.min_words:
        return "no reasoning"
    return "mentions the hint" if hinted and HINT_MENTION.search(text) else ""
