"""Stage `synthesize.branch`: branch-solve-merge (Saha et al. 2023).

Divides a task into parts, solves each separately, and merges the solutions into one answer.
"""

from __future__ import annotations

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.types import Message
from llmworks.data.store.rows import Row
from llmworks.synthesize.builder import Decoding, SyntheticDatasetBuilder, read_prompts, replace_answer
from llmworks.synthesize.text.parse import is_refusal, parse_list


class BranchConfig(Config):
    """Number of parts and sampling parameters."""

    max_parts: int = Field(4, ge=2, le=12, description="largest number of parts per task")
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    decoding: Decoding = Field(Decoding(), description="sampling parameters for dividing and solving")
    merge_decoding: Decoding = Field(
        Decoding(temperature=0.0, max_tokens=1024), description="sampling parameters for merging"
    )


def branch(config: BranchConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Answer single-turn conversations by dividing, solving and merging.

    `made_by.parts` keeps the parts and their answers.

    Errors: DataError when no row has a prompt, or no row is kept.
    """
    tasks = [
        (row, turns[-1].content)
        for row, turns in read_prompts(data, config.limit)
        if sum(m.role == "user" for m in turns) == 1
    ]
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.branch") as builder:
        prompts = [
            f"Task:\n{text}\n\nWhich parts must a good answer have? Name 2 to {config.max_parts} parts that can be"
            " worked"
            " on apart from one another and that cover the task together. Write a numbered list, one short line a"
            " part, and nothing else. Do not answer the task."
            for _, text in tasks
        ]
        divided: list[tuple[Row, str, str, list[str]]] = []
        for (row, text), prompt, answer in zip(tasks, prompts, builder.generate("divide", prompts), strict=True):
            parts = list(dict.fromkeys(parse_list(answer.text)))[: config.max_parts] if not answer.problem else []
            if len(parts) < 2:
                builder.reject(row["id"], answer.problem or "not divided", answer.text)
            else:
                divided.append((row, text, prompt, parts))
        solved = _solve(builder, divided)
        merges = [
            _merge_prompt(text, parts, solved[row["id"]]) for row, text, _, parts in divided if row["id"] in solved
        ]
        whole = [item for item in divided if item[0]["id"] in solved]
        answers = builder.generate(
            "merge", merges, max_tokens=config.merge_decoding.max_tokens, temperature=config.merge_decoding.temperature
        )
        for (row, _, prompt, parts), merge, answer in zip(whole, merges, answers, strict=True):
            if reason := answer.problem or ("refuses to answer" if is_refusal(answer.text) else ""):
                builder.reject(row["id"], reason, answer.text)
                continue
            done = [{"part": part, "answer": solution} for part, solution in zip(parts, solved[row["id"]], strict=True)]
            builder.rows.append(
                builder.build_row(
                    row["id"],
                    [prompt, merge],
                    group=row["group"],
                    answer=row["answer"],
                    source=row,
                    messages=replace_answer(row, Message("assistant", answer.text)),
                    parts=done,
                )
            )
        return builder.finish([data], note=f"{len(whole):,} of {len(tasks):,} questions divided and solved")


def _solve(builder: SyntheticDatasetBuilder, divided: list[tuple[Row, str, str, list[str]]]) -> dict[str, list[str]]:
    """Return the answers to all parts by row; a row with a failed part is rejected."""
    prompts = [
        f"Task:\n{text}\n\nThe task is worked on in parts:\n"
        + "\n".join(f"{i}. {p}" for i, p in enumerate(parts, 1))
        + f"\n\nWrite part {number} only: {part}"
        for _, text, _, parts in divided
        for number, part in enumerate(parts, 1)
    ]
    answers = iter(builder.generate("solve", prompts))
    solved: dict[str, list[str]] = {}
    for row, _, _, parts in divided:
        solutions = [next(answers) for _ in parts]
        problem = next((a.problem for a in solutions if a.problem), "")
        if problem:
            builder.reject(row["id"], f"a part was not solved ({problem})", "\n\n".join(a.text for a in solutions))
        else:
            solved[row["id"]] = [a.text for a in solutions]
    return solved


def _merge_prompt(text: str, parts: list[str], answers: list[str]) -> str:
    done = "\n\n".join(
        f"{i}. {part}\n{solution}" for i, (part, solution) in enumerate(zip(parts, answers, strict=True), 1)
    )
    return (
        f"Task:\n{text}\n\nThese are answers to its parts:\n\n{done}\n\nWrite one answer to the whole task from them:"
        " say each thing once, in a good order, and leave out what does not belong. Do not mention the parts."
    )
