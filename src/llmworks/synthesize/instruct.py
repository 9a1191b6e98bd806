"""Stage `synthesize.instruct`: new tasks from a few seed tasks, answered by the model itself (Self-Instruct, Wang et
al. 2023).

Every round shows tasks drawn from the seeds and from what was made, asks for more, and takes those that are unlike all
others and can be answered in text alone.
"""

from __future__ import annotations

import random
import re

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import Message
from llmworks.data.store.rows import read_chat
from llmworks.synthesize.asking import Decoding, Maker, Prompt, instruction_of
from llmworks.synthesize.text.diversity import Pool
from llmworks.synthesize.text.parse import numbered, refuses

# What a model that reads and writes text cannot do (the filter of Self-Instruct)
OUT_OF_REACH = re.compile(
    r"\b(?:image|images|picture|photo|graph|graphs|plot|map|draw|video|audio|music"
    r" file|attached|attachment|file|files|go to|website|url|link)\b",
    re.IGNORECASE,
)


class InstructConfig(Config):
    """How many tasks, and how they are asked for."""

    num_rows: int = Field(100, gt=0, description="tasks to make")
    max_rounds: int = Field(20, gt=0, description="stop after so many rounds, however many tasks there are")
    requests_per_round: int = Field(16, gt=0, description="requests of a round")
    num_examples: int = Field(8, ge=1, description="tasks shown as examples in a request")
    num_generated_examples: int = Field(
        2, ge=0, description="of them at most so many that were made, the rest are seeds"
    )
    tasks_per_request: int = Field(5, ge=1, description="new tasks asked for in a request")
    max_similarity: float = Field(
        0.7, gt=0, le=1, description="ROUGE-L with a task that is there from which on a new one is refused"
    )
    min_words: int = Field(4, ge=1, description="shortest task")
    max_words: int = Field(150, ge=1, description="longest task")
    decoding: Decoding = Field(Decoding(temperature=0.9), description="how tasks are drawn")
    answer_decoding: Decoding = Field(Decoding(temperature=0.0), description="how they are answered")


def instruct(config: InstructConfig, model: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Make conversations of one question and one answer; `data` are conversations whose first user turns are the seed
    tasks.

    Errors: DataError without seed tasks, or when nothing can be kept.
    """
    pool = Pool(config.max_similarity)
    seeds = [
        text for text in (" ".join(instruction_of(row).split()) for row in read_chat(data)) if text and pool.add(text)
    ]
    if not seeds:
        raise DataError(f"{data.name}: has no user turn that could be a seed task")
    draw = random.Random(ctx.seed)
    made: list[tuple[str, str]] = []  # (task, prompt)
    with Maker(ctx, model, config.decoding, "synthesize.instruct") as maker:
        for turn in range(config.max_rounds):
            if len(made) >= config.num_rows:
                break
            prompts = [
                _prompt(config, seeds, [task for task, _ in made], draw) for _ in range(config.requests_per_round)
            ]
            numbers = range(
                turn * config.requests_per_round, (turn + 1) * config.requests_per_round
            )  # two requests may show the same tasks
            asked = [
                Prompt((Message("user", prompt),), number) for number, prompt in zip(numbers, prompts, strict=True)
            ]
            for prompt, answer in zip(prompts, maker.ask(f"round {turn + 1}", asked), strict=True):
                tasks = [] if answer.problem and not answer.text else numbered(answer.text)
                tasks = tasks[:-1] if answer.problem.startswith("cut off") else tasks  # the last one is not whole
                if not tasks:
                    maker.drop(f"round {turn + 1}", answer.problem or "no list of tasks", answer.text)
                for task in tasks:
                    reason = problem_of(config, task) or ("" if pool.add(task) else "like another task")
                    if reason:
                        maker.drop(f"round {turn + 1}", reason, task)
                    elif len(made) < config.num_rows:
                        made.append((task, prompt))
        answers = maker.ask(
            "answers",
            [task for task, _ in made],
            max_tokens=config.answer_decoding.max_tokens,
            temperature=config.answer_decoding.temperature,
        )
        for number, ((task, prompt), answer) in enumerate(zip(made, answers, strict=True), 1):
            reason = answer.problem or ("refuses to answer" if refuses(answer.text) else "")
            if reason:
                maker.drop(f"task {number}", reason, f"{task}\n\n{answer.text}")
            else:
                maker.keep(
                    f"task-{number:06d}", (Message("user", task), Message("assistant", answer.text)), [prompt, task]
                )
        return maker.finish([data], note=f"{len(seeds):,} seed tasks")


def _prompt(config: InstructConfig, seeds: list[str], made: list[str], draw: random.Random) -> str:
    from_made = draw.sample(made, min(config.num_generated_examples, len(made), config.num_examples - 1))
    shown = [*draw.sample(seeds, min(config.num_examples - len(from_made), len(seeds))), *from_made]
    draw.shuffle(shown)
    examples = "\n".join(f"{i}. {task}" for i, task in enumerate(shown, 1))
    return (
        f"Here are {len(shown)} tasks that people give to an assistant that reads and writes"
        f" text:\n\n{examples}\n\nWrite {config.tasks_per_request} more tasks. They must differ from these and from one another in"
        " subject, in verb and in form; each must hold all that is needed to do it, without pictures, files or links."
        " Write a numbered list with one task a line and nothing else."
    )


def problem_of(config: InstructConfig, task: str) -> str:
    """Why a task cannot be taken, or an empty string."""
    count = len(task.split())
    if not config.min_words <= count <= config.max_words:
        return "too short" if count < config.min_words else "too long"
    if OUT_OF_REACH.search(task):
        return "needs more than text"
    if not task[0].isalnum() and task[0] not in "\"'“(¿¡":
        return "begins with a sign"
    return ""
