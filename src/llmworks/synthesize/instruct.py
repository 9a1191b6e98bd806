"""Stage `synthesize.instruct`: Self-Instruct (Wang et al. 2023): new tasks from a few seed tasks.

Every round shows seed and generated tasks as few-shot examples, requests more, and keeps those that are dissimilar to
all others and can be answered in text. The model then answers them.
"""

from __future__ import annotations

import random
import re

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.text.words import count_words
from llmworks.core.types import Message
from llmworks.data.store.rows import read_chat
from llmworks.synthesize.builder import Decoding, GenerationPrompt, SyntheticDatasetBuilder, get_instruction
from llmworks.synthesize.text.diversity import DiversityPool
from llmworks.synthesize.text.parse import is_refusal, parse_list

# Tasks beyond text input and output (Self-Instruct's filter)
BEYOND_TEXT = re.compile(
    r"\b(?:image|images|picture|photo|graph|graphs|plot|map|draw|video|audio|music"
    r" file|attached|attachment|file|files|go to|website|url|link)\b",
    re.IGNORECASE,
)


class InstructConfig(Config):
    """Number of tasks, few-shot examples and filters."""

    num_rows: int = Field(100, gt=0, description="tasks to generate")
    max_rounds: int = Field(20, gt=0, description="stop after this many rounds, even with fewer tasks")
    requests_per_round: int = Field(16, gt=0, description="requests per round")
    num_examples: int = Field(8, ge=1, description="few-shot example tasks per request")
    num_generated_examples: int = Field(
        2, ge=0, description="largest number of generated tasks among the examples; the rest are seed tasks"
    )
    tasks_per_request: int = Field(5, ge=1, description="new tasks requested per request")
    max_similarity: float = Field(
        0.7, gt=0, le=1, description="largest ROUGE-L with an existing task; more similar ones are rejected"
    )
    min_words: int = Field(4, ge=1, description="shortest task in words")
    max_words: int = Field(150, ge=1, description="longest task in words")
    decoding: Decoding = Field(Decoding(temperature=0.9), description="sampling parameters of tasks")
    answer_decoding: Decoding = Field(Decoding(temperature=0.0), description="sampling parameters of answers")


def instruct(config: InstructConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Generate single-turn conversations from seed tasks, the first user turns of the conversations in `data`.

    Errors: DataError without seed tasks, or when no row is kept.
    """
    pool = DiversityPool(config.max_similarity)
    seeds = [
        text for text in (" ".join(get_instruction(row).split()) for row in read_chat(data)) if text and pool.add(text)
    ]
    if not seeds:
        raise DataError(f"{data.name}: has no user turn to use as a seed task")
    draw = random.Random(ctx.seed)
    generated: list[tuple[str, str]] = []  # (task, prompt)
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.instruct") as builder:
        for turn in range(config.max_rounds):
            if len(generated) >= config.num_rows:
                break
            prompts = [
                _prompt(config, seeds, [task for task, _ in generated], draw) for _ in range(config.requests_per_round)
            ]
            numbers = range(
                turn * config.requests_per_round, (turn + 1) * config.requests_per_round
            )  # two requests may have the same prompt
            generation_prompts = [
                GenerationPrompt((Message("user", prompt),), number)
                for number, prompt in zip(numbers, prompts, strict=True)
            ]
            for prompt, answer in zip(prompts, builder.generate(f"round {turn + 1}", generation_prompts), strict=True):
                tasks = [] if answer.problem and not answer.text else parse_list(answer.text)
                tasks = tasks[:-1] if answer.problem.startswith("cut off") else tasks  # the last one is truncated
                if not tasks:
                    builder.reject(f"round {turn + 1}", answer.problem or "no list of tasks", answer.text)
                for task in tasks:
                    reason = find_problem(config, task) or ("" if pool.add(task) else "too similar to another task")
                    if reason:
                        builder.reject(f"round {turn + 1}", reason, task)
                    elif len(generated) < config.num_rows:
                        generated.append((task, prompt))
        answers = builder.generate(
            "answers",
            [task for task, _ in generated],
            max_tokens=config.answer_decoding.max_tokens,
            temperature=config.answer_decoding.temperature,
        )
        for number, ((task, prompt), answer) in enumerate(zip(generated, answers, strict=True), 1):
            reason = answer.problem or ("refuses to answer" if is_refusal(answer.text) else "")
            if reason:
                builder.reject(f"task {number}", reason, f"{task}\n\n{answer.text}")
            else:
                builder.keep_conversation(
                    f"task-{number:06d}", (Message("user", task), Message("assistant", answer.text)), [prompt, task]
                )
        return builder.finish([data], note=f"{len(seeds):,} seed tasks")


def _prompt(config: InstructConfig, seeds: list[str], generated: list[str], draw: random.Random) -> str:
    generated_examples = draw.sample(
        generated, min(config.num_generated_examples, len(generated), config.num_examples - 1)
    )
    shown = [*draw.sample(seeds, min(config.num_examples - len(generated_examples), len(seeds))), *generated_examples]
    draw.shuffle(shown)
    examples = "\n".join(f"{i}. {task}" for i, task in enumerate(shown, 1))
    return (
        f"Here are {len(shown)} tasks that people give to an assistant that reads and writes"
        f" text:\n\n{examples}\n\nWrite {config.tasks_per_request} more tasks. They must differ from these and from"
        " one another in"
        " subject, in verb and in form; each must hold all that is needed to do it, without pictures, files or links."
        " Write a numbered list with one task a line and nothing else."
    )


def find_problem(config: InstructConfig, task: str) -> str:
    """Return why a task is rejected, or an empty string."""
    count = count_words(task)
    if not config.min_words <= count <= config.max_words:
        return "too short" if count < config.min_words else "too long"
    if BEYOND_TEXT.search(task):
        return "needs more than text"
    if not task[0].isalnum() and task[0] not in "\"'“(¿¡":
        return "starts with a symbol"
    return ""
