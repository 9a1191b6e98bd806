"""Stage `evaluate`: a task on a model through any engine, sample by sample, with a confidence interval.

Answers are kept in scratch as they come, so that a killed run asks nothing twice. Knows tasks and the Engine protocol, no model.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field

from llmworks.artifact import Adapter, Config, Dataset, Model, Report
from llmworks.context import Context
from llmworks.data.rows import Row, flat_messages, read_chat
from llmworks.errors import DataError, RequestError, UserError
from llmworks.evaluate.bootstrap import mean_interval
from llmworks.evaluate.task import load_task
from llmworks.generate.account import Account
from llmworks.generate.journal import Journal
from llmworks.generate.remote import parse_remote
from llmworks.score import score_function
from llmworks.types import Message, Request, Sampling


class EvaluateConfig(Config):
    """What is asked."""

    task: str = Field(description="name of a built-in task")
    shots: int = Field(0, ge=0, le=8, description="worked examples in front of every question, drawn from `examples` by the run's seed")
    limit: int | None = Field(None, gt=0, description="only the first rows")
    max_tokens: int | None = Field(None, gt=0, description="longest answer, in place of the task's")


def evaluate(config: EvaluateConfig, model: Model | Adapter, data: Dataset, ctx: Context, examples: Dataset | None = None) -> Report:
    """Ask every row, greedily, and score the answers; report the mean with its 95% bootstrap interval and every sample.

    Errors: UserError for an unknown task, or shots without examples; DataError for rows without an answer.
    """
    task = load_task(config.task)
    score = score_function(task.score)
    rows = read_chat(data)[: config.limit]
    shots = draw_shots(config.shots, examples, ctx.seed)
    if not rows:
        raise DataError(f"{data.name}: has no rows")
    prompts = [question(row, shots) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        score(prompt, flat_messages(row)[-1].content, row)  # a row that cannot be scored is refused before anything is asked
    sampling = Sampling(max_tokens=config.max_tokens or task.max_tokens)
    answers, seconds = answer(prompts, rows, sampling, model, ctx)
    samples: list[dict[str, Any]] = []
    for row, prompt, said in zip(rows, prompts, answers, strict=True):
        judged = score(prompt, said["text"], row)
        samples.append(
            {
                **said,
                "question": prompt[-1].content,
                "reference": flat_messages(row)[-1].content,
                "score": judged.value,
                "reason": judged.reason,
            }
        )
    return write_report(config, model, task.what, samples, seconds, ctx)


def question(row: Row, shots: Sequence[Message]) -> tuple[Message, ...]:
    """The worked examples, then the row's conversation up to its last assistant turn."""
    try:
        messages = flat_messages(row)
    except ValueError as error:
        raise DataError(f"row {row['id']!r}: {error}") from None
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError(f"row {row['id']!r} does not end with an assistant turn, so it has no reference answer")
    return (*shots, *messages[:-1])


def draw_shots(count: int, examples: Dataset | None, seed: int) -> tuple[Message, ...]:
    """Whole conversations to put in front of every question."""
    if not count:
        return ()
    if examples is None:
        raise UserError(f"config.shots is {count}, but the step has no input `examples` to draw them from")
    rows = read_chat(examples)
    if len(rows) < count:
        raise UserError(f"config.shots is {count}, but {examples.name} has {len(rows)} rows")
    return tuple(m for row in random.Random(seed).sample(rows, count) for m in flat_messages(row))


def answer(prompts: Sequence[tuple[Message, ...]], rows: Sequence[Row], sampling: Sampling, model: Model | Adapter, ctx: Context) -> tuple[list[dict[str, Any]], float]:
    """(one record per prompt, seconds spent answering); records that scratch already holds are not asked again."""
    requests = {row["id"]: Request(prompt, sampling=sampling) for row, prompt in zip(rows, prompts, strict=True)}
    with Journal(ctx.scratch / "answers.jsonl", lambda: ctx.open_engine(model)) as journal, ctx.progress.bar(f"ask {model.name}", len(rows), "answers") as bar:
        answers = journal.ask(requests, bar)
    records: list[dict[str, Any]] = []
    for id in requests:
        found = answers[id]
        if isinstance(found, RequestError):
            raise found
        records.append(asdict(found))
    return records, sum(record["seconds"] for record in records)


def write_report(
    config: EvaluateConfig, model: Model | Adapter, what: str, samples: list[dict[str, Any]], seconds: float, ctx: Context
) -> Report:
    """Fill the report and make the artifact's metrics."""
    interval = mean_interval([s["score"] for s in samples], seed=0)
    tokens = sum(s["completion_tokens"] for s in samples)
    metrics: dict[str, Any] = {
        "score": interval.value, "low": interval.low, "high": interval.high, "samples": len(samples), "seconds": round(seconds, 2),
        "prompt_tokens": sum(s["prompt_tokens"] for s in samples), "answer_tokens": tokens, "answer_tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0, "cut_off": sum(s["finish"] == "length" for s in samples),
    }  # fmt: skip
    if isinstance(model, Model) and model.format == "http":
        options = parse_remote(model.ref)[2]
        if options.input_price or options.output_price:
            metrics["cost"] = round(Account(options.input_price, options.output_price).price(metrics["prompt_tokens"], tokens), 6)
    shots = f", {config.shots} worked example{'s' if config.shots > 1 else ''} in the prompt" if config.shots else ""
    report = ctx.report
    report.title = f"{config.task} on {model.name}{shots}"
    report.lead = f"{what}: {interval.value:.1%} (95% interval {interval.low:.1%} to {interval.high:.1%}) of {len(samples)} samples."
    report.data = {
        "task": config.task,
        "model": model.name,
        "shots": config.shots,
        "metrics": metrics,
        "samples": [_public(s) for s in samples],
    }
    report.table("Figures", ("what", "value"), list(metrics.items()))
    reasons: dict[str, int] = {}
    for s in samples:
        key = (s["reason"].split(":")[0].split(",")[0] or "right") if s["score"] < 1 else "right"
        reasons[key] = reasons.get(key, 0) + 1
    report.table("Why answers were wrong", ("reason", "samples"), sorted(reasons.items(), key=lambda r: -r[1])[:20])
    report.samples(
        "Samples",
        [
            {
                "": f"{'✓' if s['score'] == 1 else '✗'} {s['question'][:110]}",
                "answer": s["text"],
                "reference": s["reference"],
                "why": s["reason"] or "right",
            }
            for s in samples[:40]
        ],
    )
    return Report(ctx.out, metrics=metrics, about={"task": config.task, "shots": config.shots, "model": model.digest})


def _public(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sample.items() if k != "seconds"}
