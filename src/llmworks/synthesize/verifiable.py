"""Stage `synthesize.verifiable`: verifiable instructions about given texts, with answers built by rule.

Uses no model. Each row names the IFEval and IFBench checks that its answer must pass, so that any answer can be
scored: by the task `instructions`, in rejection sampling, as a reward. Rows about one text are one group, so that a
split keeps them together.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError
from llmworks.data.card import finish_rows
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.rows import Row, detect_schema, flatten_messages, read_chat
from llmworks.synthesize import instruction_rules

ATTEMPTS = 8  # attempts for a text whose sampled instructions conflict
TASK_PROMPTS = (
    "Write this text again.",
    "Here is a text. Give it again, with a change.",
    "Repeat the text below as you are told.",
    "Rewrite the text that follows.",
)


class VerifiableConfig(Config):
    """Number of rows and of instructions per row."""

    num_rows: int = Field(0, ge=0, description="largest number of rows; 0: one for each text")
    min_instructions: int = Field(1, ge=1, le=6, description="fewest instructions per row")
    max_instructions: int = Field(3, ge=1, le=6, description="most instructions per row")
    instruction_ids: list[str] = Field([], description="instruction ids to use, such as startend:quotation; empty: all")
    word_range: tuple[int, int] = Field((6, 24), description="shortest and longest text in words; others are rejected")
    seed: int = Field(0, ge=0, description="random seed")

    @model_validator(mode="after")
    def _fits(self) -> VerifiableConfig:
        if self.min_instructions > self.max_instructions:
            raise ValueError(
                f"min_instructions ({self.min_instructions}) is larger than max_instructions ({self.max_instructions})"
            )
        if self.word_range[0] < 1 or self.word_range[0] > self.word_range[1]:
            raise ValueError("word_range must be two positive numbers, the smaller first")
        known = [rule.name for rule in instruction_rules.RULES]
        unknown = next((name for name in self.instruction_ids if name not in known), None)
        if unknown is not None:
            raise ValueError(f"instruction_ids: {unknown!r} is unknown; use one of {', '.join(known)}")
        return self


def verifiable(config: VerifiableConfig, data: Dataset, ctx: Context) -> Dataset:
    """Create a row for each text: the first line of a document, or the last user turn of a conversation.

    Errors: DataError where no text has a length within word_range.
    """
    selected_rules = tuple(
        rule for rule in instruction_rules.RULES if not config.instruction_ids or rule.name in config.instruction_ids
    )
    rejected, seen = RejectedRows(), set[str]()
    rows: list[Row] = []
    texts = _read_texts(data)
    random = Random(config.seed)
    random.shuffle(texts)
    for id, text in texts:
        if config.num_rows and len(rows) == config.num_rows:
            break
        if not config.word_range[0] <= len(text.split()) <= config.word_range[1] or text in seen:
            rejected.add(
                data.name,
                0,
                "duplicate" if text in seen else f"not {config.word_range[0]} to {config.word_range[1]} words long",
                text,
            )
            continue
        seen.add(text)
        row = next(
            (
                row
                for attempt in range(ATTEMPTS)
                if (row := _build_row(id, text, config, selected_rules, Random(f"{config.seed} {id} {attempt}")))
                is not None
            ),
            None,
        )
        if row is None:
            rejected.add(data.name, 0, "no instructions fit this text", text)
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"{data.name}: none of {len(texts)} texts is {config.word_range[0]} to {config.word_range[1]} words long"
            f" and fits {config.min_instructions} instructions{' of instruction_ids' if config.instruction_ids else ''}"
        )
    rejected.write(ctx.out, ctx.progress.log)
    kinds = Counter(name for row in rows for name in row["answer"]["constraints"])
    instruction_counts = Counter(len(row["answer"]["constraints"]) for row in rows)
    _describe(ctx, data, rows, kinds, instruction_counts)
    return finish_rows(
        ctx,
        "synthesize.verifiable",
        [data],
        rows,
        dropped=Counter(row["reason"] for row in rejected.rows),
        metrics={"instructions": sum(kinds.values())},
        note="answers built by rule",
    )


def _describe(
    ctx: Context, data: Dataset, rows: list[dict[str, Any]], kinds: Counter[Any], instruction_counts: Counter[int]
) -> None:
    """Write the report: instruction counts and examples."""
    ctx.report.title = f"Verifiable instructions about {data.name}"
    ctx.report.subtitle = (
        f"{len(rows):,} rows, {sum(kinds.values()):,} instructions; every answer was built by rule and passes its"
        " checks."
    )
    ctx.report.data = {"rows": len(rows), "kinds": dict(kinds), "instructions": dict(instruction_counts)}
    ctx.report.add_table("Instructions", ("instruction", "rows"), kinds.most_common())
    ctx.report.add_table("Instructions per row", ("instructions", "rows"), sorted(instruction_counts.items()))
    ctx.report.add_table(
        "Examples",
        ("question", "answer"),
        [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows[:8]],
    )


def _build_row(
    id: str, text: str, config: VerifiableConfig, kinds: tuple[instruction_rules.InstructionRule, ...], random: Random
) -> Row | None:
    """Return a row about a text; None where too few instructions fit it, or the sampled ones conflict.

    Example of a conflict: a quotation around a repeated text.
    """
    from llmworks.score.constraints import check_instructions

    selected = instruction_rules.sample_rules(
        kinds, text, random.randint(config.min_instructions, config.max_instructions), random
    )
    answer = instruction_rules.build_answer(text, selected)
    names, arguments = (
        [rule.name for rule, _ in selected],
        [
            {key: value for key, value in given.items() if key not in instruction_rules.INTERNAL_ARGUMENTS}
            for _, given in selected
        ],
    )
    if len(selected) < config.min_instructions or not all(check_instructions(answer, names, arguments)):
        return None
    instructions = [instruction_rules.format_instruction(rule, given, random) for rule, given in selected]
    messages = [
        {"role": "user", "content": f"{random.choice(TASK_PROMPTS)} {' '.join(instructions)}\n\n{text}"},
        {"role": "assistant", "content": answer},
    ]
    return {
        "id": id,
        "group": id,
        "messages": messages,
        "tools": [],
        "answer": {"constraints": names, "arguments": arguments},
        "extra": {"text": text},
    }


def _read_texts(data: Dataset) -> list[tuple[str, str]]:
    """Return (id, text on one line)."""
    if detect_schema(data) == "chat":
        found = []
        for row in read_chat(data):
            user_turns = [message.content for message in flatten_messages(row) if message.role == "user"]
            if user_turns:
                found.append((str(row["id"]), " ".join(user_turns[-1].split())))
        return found
    return [
        (document.id, " ".join(next((line for line in document.text.splitlines() if line.strip()), "").split()))
        for document in read_documents(data)
    ]
