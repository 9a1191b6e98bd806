"""Stage `evaluate`: a task on a model through any engine, sample by sample, with confidence intervals.

What an engine answered is kept in scratch as it comes, so that a killed run asks nothing twice. Knows tasks and the
Engine protocol, no model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.evaluate.protocol.ask import Asker
from llmworks.evaluate.protocol.load_task import checked, load_task
from llmworks.evaluate.protocol.questions import kept, one_side, questions, read_rows
from llmworks.evaluate.protocol.response_cache import Memory
from llmworks.evaluate.protocol.results import measure, write_report
from llmworks.evaluate.protocol.task import Shots, Task
from llmworks.evaluate.statistics.bootstrap import detectable
from llmworks.evaluate.statistics.metrics import metric_of


class EvaluateConfig(Config):
    """What is asked."""

    task: str = Field(description="name of a built-in task, or a YAML file of a task (the lm-evaluation-harness's too)")
    definition: dict[str, Any] = Field(
        {}, description="the task as it was read, so that another content is another evaluation; filled in from `task`"
    )
    num_fewshot: int | None = Field(
        None, ge=0, le=100, description="worked examples in front of every question, in place of the task's"
    )
    prompt_format: Literal["", "plain", "chat"] = Field(
        "", description="in place of the task's: `plain` text that the model goes on with, or `chat` turns"
    )
    split_half: Literal["all", "dev", "test"] = Field(
        "all",
        description=(
            "half of the rows, always the same half: `dev` to find failures that the model may be trained on"
            " (evaluate.to_training), `test` to measure it afterwards"
        ),
    )
    limit: int | None = Field(None, gt=0, description="only the first rows")
    max_tokens: int | None = Field(None, gt=0, description="longest answer, in place of the task's")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("task"), str) and not values.get("definition"):
            return {**values, "definition": load_task(values["task"]).model_dump(mode="json")}
        return values


def evaluate(
    config: EvaluateConfig, model: Model | Adapter, data: Dataset, ctx: Context, fewshot: Dataset | None = None
) -> Report:
    """Ask every row and score what comes back; report each metric with its 95% interval, every sample, and what decided
    the prompts.

    Errors: UserError for an unknown task, too few rows for worked examples, or an engine that cannot be asked so;
    DataError for rows without a right answer.
    """
    task = with_config(checked(config.task, config.definition), config, ctx.seed)
    every = read_rows(task, data, task.split)
    rows = one_side(kept(task, every, data.name), config.split_half, task)
    alone = fewshot is None or (
        fewshot.path.resolve() == data.path.resolve() and task.examples_split in ("", task.split)
    )
    pool = rows if fewshot is None else read_rows(task, fewshot, task.examples_split or task.split)
    try:
        asked = questions(task, rows[: config.limit], pool, same_pool=alone)
    except DataError as error:
        raise DataError(f"task {config.task}, data {data.name}: {error}") from None
    ctx.progress.say(expectation(task, len(asked)))
    measure(task, [], asked)  # a row that cannot be scored is refused before anything is asked
    engine = ctx.open_engine(model)
    try:
        asker = Asker(
            task, engine, ctx.scratch, ctx.progress, Memory(ctx.scratch.parent, model.digest, type(engine).__name__)
        )
        asker.check()
        answered = asker.ask(asked)
    finally:
        engine.close()
    return write_report(
        task,
        model,
        measure(task, answered, asked),
        {
            **asker.protocol,
            "rows": len(every),
            "left_out": len(every) - len(rows),
            "asked": len(asked),
            "side": config.split_half,
        },
        ctx,
    )


def with_config(task: Task, config: EvaluateConfig, seed: int) -> Task:
    """The task with what a run changes. A run's seed draws the examples, unless the task's own draw has one."""
    changes: dict[str, Any] = {}
    if config.num_fewshot is not None:
        changes["shots"] = Shots(
            **{**task.shots.model_dump(), "count": config.num_fewshot, "seed": task.shots.seed + seed}
        )
    if config.prompt_format:
        changes["prompt"] = config.prompt_format
    if config.max_tokens:
        changes["max_tokens"] = config.max_tokens
    return checked(task.name, {**task.model_dump(), **changes}) if changes else task


def expectation(task: Task, samples: int) -> str:
    """What so many samples can tell at all: said before they are asked."""
    metric = metric_of(task.kind, task.metrics[0])
    if not metric.percent:
        return f"{task.name}: {samples} samples"
    least = detectable(0.5 * 2**0.5, samples)
    if least >= 1:
        return f"{task.name}: {samples} samples, which are too few to tell two models apart"
    return (
        f"{task.name}: {samples} samples; differences between two models below about {least:.0%} are seldom told from"
        " chance (less where both answer alike)"
    )
