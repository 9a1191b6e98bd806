"""Stage `synthesize.sample`: rejection sampling (as in Yuan et al. 2023): keep sampled completions that a verifier
accepts.

The verifier follows the row's `answer`: a key, a regular expression, a JSON schema, unit tests, a SQL query, a
function call.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.types import Message, Score, ToolCall
from llmworks.score import get_score_function
from llmworks.synthesize.builder import (
    Decoding,
    GenerationPrompt,
    SyntheticDatasetBuilder,
    read_prompts,
    replace_answer,
)
from llmworks.tokenize.chat.templates import parse_tool_calls


class SampleConfig(Config):
    """Number of completions, acceptance and selection."""

    num_generations: int = Field(4, ge=1, le=256, description="completions sampled per prompt")
    score_function: str = Field("verified", description="score function; verified: by the kind of the row's `answer`")
    min_score: float = Field(1.0, ge=0, le=1, description="smallest accepted score; 0 accepts every completion")
    keep: Literal["first", "shortest", "all"] = Field(
        "first", description="which accepted completions of a prompt are kept; all: the distinct ones"
    )
    stop_on_accept: bool = Field(
        True, description="stop sampling a prompt once a completion is accepted (not with keep shortest or all)"
    )
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    decoding: Decoding = Field(Decoding(), description="sampling parameters")


def sample(config: SampleConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Sample completions for conversations (their turns before the last answer) and keep the verified ones.

    Errors: DataError for rows that cannot be verified, or when none is accepted; UserError for an unknown score
    function.
    """
    score = get_score_function(config.score_function)
    prompt_rows = read_prompts(data, config.limit)
    for row, turns in prompt_rows:
        score(turns, "", row)  # fail on a row that cannot be scored before any request
    accepted: dict[str, list[tuple[GenerationPrompt, str, int]]] = {row["id"]: [] for row, _ in prompt_rows}
    problems: dict[str, tuple[str, str]] = {}
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.sample") as builder:
        for turn in range(config.num_generations):
            todo = [
                (row, turns)
                for row, turns in prompt_rows
                if not (accepted[row["id"]] and config.stop_on_accept and config.keep == "first")
            ]
            prompts = [GenerationPrompt(turns, turn) for _, turns in todo]
            for (row, turns), prompt, answer in zip(
                todo, prompts, builder.generate(f"answer {turn + 1}", prompts), strict=True
            ):
                problem = answer.problem or _find_problem(score(turns, answer.text, row), config.min_score)
                if problem:
                    problems[row["id"]] = (answer.problem or f"no completion accepted ({problem})", answer.text)
                else:
                    accepted[row["id"]].append((prompt, answer.text, turn + 1))
        for row, _ in prompt_rows:
            if not accepted[row["id"]]:
                builder.reject(row["id"], *problems[row["id"]])
            for number, (prompt, text, turn) in enumerate(_select_accepted(config, accepted[row["id"]]), 1):
                id = row["id"] if config.keep != "all" else f"{row['id']}~{number}"
                builder.rows.append(
                    builder.build_row(
                        id,
                        [prompt],
                        group=row["group"],
                        tools=row["tools"],
                        answer=row["answer"],
                        source=row,
                        messages=replace_answer(row, to_assistant_turn(text)),
                        drawn=turn,
                        accepted=len(accepted[row["id"]]),
                    )
                )
        solved = sum(map(bool, accepted.values()))
        return builder.finish(
            [data],
            metrics={"questions": len(prompt_rows), "solved": solved},
            note=f"{solved:,} of {len(prompt_rows):,} prompts solved, by {config.score_function}",
        )


def _find_problem(score: Score, min_score: float) -> str:
    """Return why a score is too low, or an empty string."""
    return "" if score.value >= min_score else score.reason or f"score {score.value:.2g}"


def _select_accepted(
    config: SampleConfig, accepted: list[tuple[GenerationPrompt, str, int]]
) -> list[tuple[GenerationPrompt, str, int]]:
    distinct = list({text: (prompt, text, turn) for prompt, text, turn in reversed(accepted)}.values())[::-1]
    if config.keep == "all" or not distinct:
        return distinct
    return [min(distinct, key=lambda item: len(item[1]))] if config.keep == "shortest" else distinct[:1]


def to_assistant_turn(text: str) -> Message:
    """Return a completion as an assistant turn; function calls written in it are parsed."""
    content, calls = parse_tool_calls(text)
    return Message("assistant", content, tuple(ToolCall(c.name, c.arguments) for c in calls))
