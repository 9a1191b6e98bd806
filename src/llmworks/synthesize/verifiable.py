"""Stage `synthesize.verifiable`: instructions about given texts that can be verified, with an answer made by rule.

No model is asked.

Each row says which of IFEval's and IFBench's checks its answer has to pass, so that any answer to it can be scored: by
the task `instructions`, by rejection sampling, as a reward. Rows about one text are one group, so that a split keeps
them together.
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
from llmworks.data.store.jsonl import Rejected
from llmworks.data.store.rows import Row, flat_messages, read_chat, schema_of
from llmworks.synthesize import rules

ATTEMPTS = 8  # draws for a text whose instructions did not go together
OPENINGS = (
    "Write this text again.",
    "Here is a text. Give it again, with a change.",
    "Repeat the text below as you are told.",
    "Rewrite the text that follows.",
)


class VerifiableConfig(Config):
    """How many rows, and how much each asks."""

    num_rows: int = Field(0, ge=0, description="at most so many; 0: one of each text")
    min_instructions: int = Field(1, ge=1, le=6, description="instructions of a row, at least")
    max_instructions: int = Field(3, ge=1, le=6, description="instructions of a row, at most")
    instruction_ids: list[str] = Field(
        [], description="which instructions, by their names, as startend:quotation; empty: all"
    )
    word_range: tuple[int, int] = Field((6, 24), description="how many words a text has; others are set aside")
    seed: int = Field(0, ge=0, description="seed of the draws")

    @model_validator(mode="after")
    def _fits(self) -> VerifiableConfig:
        if self.min_instructions > self.max_instructions:
            raise ValueError(f"least ({self.min_instructions}) is more than most ({self.max_instructions})")
        if self.word_range[0] < 1 or self.word_range[0] > self.word_range[1]:
            raise ValueError("words are two numbers, the smaller first")
        known = [rule.name for rule in rules.RULES]
        unknown = next((name for name in self.instruction_ids if name not in known), None)
        if unknown is not None:
            raise ValueError(f"kinds: {unknown!r} is none of {', '.join(known)}")
        return self


def verifiable(config: VerifiableConfig, data: Dataset, ctx: Context) -> Dataset:
    """Make a row of each text: of documents their first line, of conversations the last question.

    Errors: DataError where no text has the wanted length.
    """
    chosen = tuple(rule for rule in rules.RULES if not config.instruction_ids or rule.name in config.instruction_ids)
    rejected, seen = Rejected(), set[str]()
    rows: list[Row] = []
    texts = _texts(data)
    random = Random(config.seed)
    random.shuffle(texts)
    for id, text in texts:
        if config.num_rows and len(rows) == config.num_rows:
            break
        if not config.word_range[0] <= len(text.split()) <= config.word_range[1] or text in seen:
            rejected.add(
                data.name,
                0,
                "stood before" if text in seen else f"not of {config.word_range[0]} to {config.word_range[1]} words",
                text,
            )
            continue
        seen.add(text)
        row = next(
            (
                row
                for attempt in range(ATTEMPTS)
                if (row := _row(id, text, config, chosen, Random(f"{config.seed} {id} {attempt}"))) is not None
            ),
            None,
        )
        if row is None:
            rejected.add(data.name, 0, "no instructions fit this text", text)
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"{data.name}: none of {len(texts)} texts is of {config.word_range[0]} to {config.word_range[1]} words and has room"
            f" for {config.min_instructions} of the instructions{' of kinds' if config.instruction_ids else ''}"
        )
    rejected.write(ctx.out, ctx.progress.say)
    kinds = Counter(name for row in rows for name in row["answer"]["constraints"])
    asked = Counter(len(row["answer"]["constraints"]) for row in rows)
    _describe(ctx, data, rows, kinds, asked)
    return finish_rows(
        ctx,
        "synthesize.verifiable",
        [data],
        rows,
        dropped=Counter(row["reason"] for row in rejected.rows),
        metrics={"instructions": sum(kinds.values())},
        note="answers made by rule",
    )


def _describe(
    ctx: Context, data: Dataset, rows: list[dict[str, Any]], kinds: Counter[Any], asked: Counter[int]
) -> None:
    """Write the page: how often each instruction stands, and examples."""
    ctx.report.title = f"Verifiable instructions about {data.name}"
    ctx.report.lead = (
        f"{len(rows):,} rows, {sum(kinds.values()):,} instructions; every answer was made by rule and passes its"
        " checks."
    )
    ctx.report.data = {"rows": len(rows), "kinds": dict(kinds), "instructions": dict(asked)}
    ctx.report.table("Instructions", ("instruction", "rows"), kinds.most_common())
    ctx.report.table("How many a row has", ("instructions", "rows"), sorted(asked.items()))
    ctx.report.table(
        "Examples",
        ("question", "answer"),
        [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows[:8]],
    )


def _row(id: str, text: str, config: VerifiableConfig, kinds: tuple[rules.Rule, ...], random: Random) -> Row | None:
    """A row about a text; None where too few instructions fit it, or those drawn do not go together, as a quotation
    around a repeated text.
    """
    from llmworks.score.constraints import followed

    found = rules.chosen(kinds, text, random.randint(config.min_instructions, config.max_instructions), random)
    made = rules.answer(text, found)
    names, arguments = (
        [rule.name for rule, _ in found],
        [{key: value for key, value in given.items() if key not in rules.OURS} for _, given in found],
    )
    if len(found) < config.min_instructions or not all(followed(made, names, arguments)):
        return None
    asked = [rules.said(rule, given, random) for rule, given in found]
    messages = [
        {"role": "user", "content": f"{random.choice(OPENINGS)} {' '.join(asked)}\n\n{text}"},
        {"role": "assistant", "content": made},
    ]
    return {
        "id": id,
        "group": id,
        "messages": messages,
        "tools": [],
        "answer": {"constraints": names, "arguments": arguments},
        "extra": {"text": text},
    }


def _texts(data: Dataset) -> list[tuple[str, str]]:
    """(id, text on one line)."""
    if schema_of(data) == "chat":
        found = []
        for row in read_chat(data):
            asked = [message.content for message in flat_messages(row) if message.role == "user"]
            if asked:
                found.append((str(row["id"]), " ".join(asked[-1].split())))
        return found
    return [
        (document.id, " ".join(next((line for line in document.text.splitlines() if line.strip()), "").split()))
        for document in read_documents(data)
    ]
