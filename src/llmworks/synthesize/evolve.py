"""Stage `synthesize.evolve`: Evol-Instruct (Xu et al. 2023): make instructions harder or different, step by step.

In-depth operators: constrain, deepen, concretize, reason, enrich. In-breadth operator: a new instruction in the same
domain. Failed evolutions are rejected, and their parent stays for the next round. Each evolved instruction gets a new
answer.
"""

from __future__ import annotations

import random
import re
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.text.words import count_words
from llmworks.core.types import Message, messages_from_json
from llmworks.synthesize.builder import Decoding, GeneratedText, GenerationPrompt, SyntheticDatasetBuilder, read_prompts
from llmworks.synthesize.text.diversity import DiversityPool
from llmworks.synthesize.text.parse import is_refusal, parse_labeled, strip_markup

Operator = Literal["constrain", "deepen", "concretize", "reason", "enrich", "breadth"]
OPERATOR_PROMPTS: dict[Operator, str] = {
    "constrain": "Add one condition or requirement that an answer must meet.",
    "deepen": "Where it asks about something in general, ask for more depth and breadth about it.",
    "concretize": "Put more specific notions in the place of general ones.",
    "reason": (
        "Where it can be answered in a single step, rewrite it so that several steps of thought are needed, and ask for"
        " them."
    ),
    "enrich": "Give it richer input to work on: a table, a piece of code, a formula or some JSON, written out in full.",
}
PROMPT_MENTION = re.compile(
    r"\b(?:given|original|rewritten|new|created|evolved)[ _](?:prompt|instruction)s?\b", re.IGNORECASE
)
SAME_PROMPT = (
    "Are these two instructions the same, that is, with the same conditions, the same depth and the same"
    " breadth?\n\nFirst:\n{0}\n\nSecond:\n{1}\n\nAnswer with one word, yes or no."
)


class EvolveConfig(Config):
    """Evolution operators, number of evolutions and filters."""

    num_evolutions: int = Field(2, ge=1, le=8, description="number of evolutions of each instruction")
    operators: tuple[Operator, ...] = Field(
        ("constrain", "deepen", "concretize", "reason", "breadth"),
        min_length=1,
        description="evolution operators; one is sampled for each evolution",
    )
    include_original: bool = Field(True, description="include the input rows unchanged")
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    max_added_words: int = Field(
        25,
        ge=1,
        description=(
            "words that an in-depth evolution may add; requested in the prompt, and more than"
            " twice as many are rejected"
        ),
    )
    max_similarity: float = Field(
        0.9, gt=0, le=1, description="largest ROUGE-L with an existing instruction; more similar ones are rejected"
    )
    check_unchanged: bool = Field(
        True, description="ask the model whether an evolution changed the instruction, and reject unchanged ones"
    )
    decoding: Decoding = Field(Decoding(), description="sampling parameters of instructions")
    answer_decoding: Decoding = Field(Decoding(temperature=0.0), description="sampling parameters of answers")


def evolve(config: EvolveConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Evolve the first user turn of single-turn conversations without tools; each successful evolution is a row.

    Errors: DataError when no row has a prompt, or no row is kept.
    """
    draw = random.Random(ctx.seed)
    pool = DiversityPool(config.max_similarity)
    rows = [row for row, turns in read_prompts(data, config.limit) if len(turns) <= 2 and not row["tools"]]
    systems = {row["id"]: tuple(m for m in messages_from_json(row["messages"]) if m.role == "system") for row in rows}
    by_id = {row["id"]: row for row in rows}
    current = {row["id"]: next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows}
    for text in current.values():
        pool.add(text)
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.evolve") as builder:
        if config.include_original:
            builder.rows += [row for row in rows if row["messages"][-1]["role"] == "assistant"]
        for step in range(1, config.num_evolutions + 1):
            steps = [(id, draw.choice(config.operators)) for id in current]
            prompts = [_prompt(config, operator, current[id]) for id, operator in steps]
            evolved = {}  # id -> (operator, prompt, instruction)
            replies = builder.generate(f"step {step}", prompts)
            for (id, operator), prompt, answer in zip(steps, prompts, replies, strict=True):
                instruction = parse_labeled(answer.text, "new instruction") or strip_markup(answer.text)
                reason = find_problem(config, operator, current[id], instruction, answer) or (
                    "" if pool.add(instruction) else "too similar to another instruction"
                )
                if reason:
                    builder.reject(f"{id}~{step}", reason, answer.text)
                else:
                    evolved[id] = (operator, prompt, instruction)
            instructions = {id: instruction for id, (_, _, instruction) in evolved.items()}
            for id in _find_unchanged(config, builder, current, instructions):
                builder.reject(f"{id}~{step}", "unchanged", evolved.pop(id)[2])
            answer_prompts = {
                id: GenerationPrompt((*systems[id], Message("user", instruction)))
                for id, (_, _, instruction) in evolved.items()
            }
            answers = builder.generate(
                f"answers {step}",
                list(answer_prompts.values()),
                max_tokens=config.answer_decoding.max_tokens,
                temperature=config.answer_decoding.temperature,
            )
            for (id, (operator, prompt, instruction)), answer in zip(evolved.items(), answers, strict=True):
                if reason := answer.problem or find_answer_problem(answer.text):
                    builder.reject(f"{id}~{step}", reason, f"{instruction}\n\n{answer.text}")
                    continue
                turns = (*answer_prompts[id].messages, Message("assistant", answer.text))
                builder.keep_conversation(
                    f"{id}~{step}",
                    turns,
                    [prompt, answer_prompts[id]],
                    group=by_id[id]["group"],
                    source=by_id[id],
                    operator=operator,
                    step=step,
                    evolved_from=current[id],
                )
                current[id] = instruction
        return builder.finish([data], note=f"{len(rows):,} instructions, {config.num_evolutions} steps")


def _prompt(config: EvolveConfig, operator: Operator, instruction: str) -> str:
    if operator == "breadth":
        return (
            "Read this instruction:\n\n"
            + instruction
            + "\n\nWrite another one of the same field, but rarer. It must be about as long and as hard, make sense,"
            " and be answerable by an assistant that reads and writes text. Write it behind the words `New"
            " instruction:` and nothing else."
        )
    return (
        "Read this instruction:\n\n"
        + instruction
        + "\n\nRewrite it so that it is harder to answer well, but still makes sense and can be answered by an"
        f" assistant that reads and writes text. {OPERATOR_PROMPTS[operator]} Add about {config.max_added_words}"
        " words at most, and"
        " leave out nothing that it gives. Do not answer it. Write the result behind the words `New instruction:`"
        " and nothing else."
    )


def find_problem(config: EvolveConfig, operator: Operator, before: str, after: str, answer: GeneratedText) -> str:
    """Return why an evolution failed, or an empty string."""
    if answer.problem:
        return answer.problem
    if count_words(after) < 3:
        return "no instruction"
    if PROMPT_MENTION.search(after):
        return "mentions the prompt"
    if operator not in ("breadth", "enrich") and count_words(after) > count_words(before) + 2 * config.max_added_words:
        return "too long"
    return "refuses to answer" if is_refusal(after) else ""


def find_answer_problem(answer: str) -> str:
    """Return why an answer shows that the evolution failed (Xu et al. 2023, section 2.2), or an empty string."""
    if is_refusal(answer):
        return "refuses to answer"
    return "" if re.search(r"\w\w", answer) else "answer without words"


def _find_unchanged(
    config: EvolveConfig, builder: SyntheticDatasetBuilder, before: dict[str, str], after: dict[str, str]
) -> list[str]:
    if not config.check_unchanged or not after:
        return []
    verdicts = builder.generate(
        "compare", [SAME_PROMPT.format(before[id], text) for id, text in after.items()], max_tokens=8, temperature=0.0
    )
    return [id for id, answer in zip(after, verdicts, strict=True) if re.match(r"\W*yes\b", answer.text, re.IGNORECASE)]
