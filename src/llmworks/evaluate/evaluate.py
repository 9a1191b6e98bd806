"""Stage `evaluate`: run a task on a model through any engine, sample by sample, with confidence intervals.

Engine responses are cached in scratch as they arrive, so that an interrupted run repeats no request. Depends on tasks
and the Engine protocol, not on models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.evaluate.protocol.load_task import load_task, validate_task
from llmworks.evaluate.protocol.questions import build_questions, filter_rows, read_rows, select_half
from llmworks.evaluate.protocol.request_runner import RequestRunner
from llmworks.evaluate.protocol.response_cache import ResponseCache
from llmworks.evaluate.protocol.results import score_responses, write_report
from llmworks.evaluate.protocol.task import FewShotConfig, Task
from llmworks.evaluate.statistics.bootstrap import minimum_detectable_effect
from llmworks.evaluate.statistics.metrics import get_metric


class EvaluateConfig(Config):
    """Task and how to run it."""

    task: str = Field(description="name of a built-in task, or a task's YAML file (also of the lm-evaluation-harness)")
    definition: dict[str, Any] = Field(
        {}, description="the parsed task, so that a changed task is a new evaluation; filled in from `task`"
    )
    num_fewshot: int | None = Field(
        None, ge=0, le=100, description="few-shot examples before every question; overrides the task"
    )
    prompt_format: Literal["", "plain", "chat"] = Field(
        "", description="overrides the task: `plain` text that the model continues, or `chat` turns"
    )
    split_half: Literal["all", "dev", "test"] = Field(
        "all",
        description=(
            "half of the rows, always the same half: `dev` to find failures that the model may be trained on"
            " (evaluate.to_training), `test` to measure it afterwards"
        ),
    )
    limit: int | None = Field(None, gt=0, description="evaluate only the first rows")
    max_tokens: int | None = Field(None, gt=0, description="maximum new tokens of a completion; overrides the task")

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("task"), str) and not values.get("definition"):
            return {**values, "definition": load_task(values["task"]).model_dump(mode="json")}
        return values


def evaluate(
    config: EvaluateConfig, model: Model | Adapter, data: Dataset, ctx: Context, fewshot: Dataset | None = None
) -> Report:
    """Evaluate a model on a task; report each metric with its 95% interval, every sample and the prompt settings.

    Errors: UserError for an unknown task, too few rows for few-shot examples, or an engine that lacks what the task
    needs; DataError for rows without a right answer.
    """
    task = apply_overrides(validate_task(config.task, config.definition), config, ctx.seed)
    all_rows = read_rows(task, data, task.split)
    rows = select_half(filter_rows(task, all_rows, data.name), config.split_half, task)
    same_pool = fewshot is None or (
        fewshot.path.resolve() == data.path.resolve() and task.examples_split in ("", task.split)
    )
    pool = rows if fewshot is None else read_rows(task, fewshot, task.examples_split or task.split)
    try:
        evaluated = build_questions(task, rows[: config.limit], pool, same_pool=same_pool)
    except DataError as error:
        raise DataError(f"task {config.task}, data {data.name}: {error}") from None
    ctx.progress.log(describe_power(task, len(evaluated)))
    score_responses(task, [], evaluated)  # reject rows that cannot be scored before any request is sent
    engine = ctx.open_engine(model)
    try:
        runner = RequestRunner(
            task,
            engine,
            ctx.scratch,
            ctx.progress,
            ResponseCache(ctx.scratch.parent, model.digest, type(engine).__name__),
        )
        runner.check()
        responses = runner.run(evaluated)
    finally:
        engine.close()
    return write_report(
        task,
        model,
        score_responses(task, responses, evaluated),
        {
            **runner.protocol,
            "rows": len(all_rows),
            "filtered_rows": len(all_rows) - len(rows),
            "num_samples": len(evaluated),
            "side": config.split_half,
        },
        ctx,
    )


def apply_overrides(task: Task, config: EvaluateConfig, seed: int) -> Task:
    """Apply a run's overrides to the task. With num_fewshot, the run's seed is added to the task's."""
    changes: dict[str, Any] = {}
    if config.num_fewshot is not None:
        changes["shots"] = FewShotConfig(
            **{**task.shots.model_dump(), "count": config.num_fewshot, "seed": task.shots.seed + seed}
        )
    if config.prompt_format:
        changes["prompt"] = config.prompt_format
    if config.max_tokens:
        changes["max_tokens"] = config.max_tokens
    return validate_task(task.name, {**task.model_dump(), **changes}) if changes else task


def describe_power(task: Task, samples: int) -> str:
    """Describe the smallest difference that this many samples can detect, before running them."""
    metric = get_metric(task.kind, task.metrics[0])
    if not metric.percent:
        return f"{task.name}: {samples} samples"
    detectable_difference = minimum_detectable_effect(0.5 * 2**0.5, samples)
    if detectable_difference >= 1:
        return f"{task.name}: {samples} samples, too few to distinguish two models"
    return (
        f"{task.name}: {samples} samples; differences between two models below about"
        f" {detectable_difference * 100:.0f} percentage points are rarely significant"
        " (paired comparisons of similar models detect smaller ones)"
    )
