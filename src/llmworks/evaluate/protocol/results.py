"""Turn responses into metrics, stored samples and a report. Does not call an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Adapter, Model, Report
from llmworks.core.context import Context
from llmworks.core.types import Message
from llmworks.evaluate.protocol.filters import PatternTimeout, extract
from llmworks.evaluate.protocol.questions import Question
from llmworks.evaluate.protocol.request_runner import QuestionResult
from llmworks.evaluate.protocol.task import Task
from llmworks.evaluate.statistics.bootstrap import MetricInterval, bootstrap_interval, exact_interval, sum_by_group
from llmworks.evaluate.statistics.metrics import (
    ChoiceSample,
    GeneratedSample,
    LikelihoodSample,
    Metric,
    get_metric,
    list_score_functions,
)
from llmworks.generate.remote.endpoint import parse_remote
from llmworks.generate.remote.usage import UsageMeter
from llmworks.score import get_score_function

SHOWN, FEW_GROUPS = 40, 20


@dataclass(frozen=True)
class EvaluationResult:
    """All metrics of a run with their intervals (the first is the score), and the stored samples."""

    metrics: dict[str, Metric]
    values: dict[str, MetricInterval]
    samples: list[dict[str, Any]]


def score_responses(task: Task, results: Sequence[QuestionResult], questions: Sequence[Question]) -> EvaluationResult:
    """Score the responses.

    Without responses only the rows are checked: DataError for one whose own reference cannot be scored.
    """
    names = list_score_functions(task.metrics) if task.kind == "generate" else []
    if not results:
        for question in questions:
            reference = question.references[0] if question.references else ""
            for name in names:
                get_score_function(name)(_prompt(question), reference, question.row)
        return EvaluationResult({}, {}, [])
    metrics: dict[str, Metric] = {}
    values: dict[str, MetricInterval] = {}
    samples = [_build_sample_record(task, one) for one in results]
    groups = [one.question.group for one in results]
    for filter_name, steps in task.extract.items():
        scored = [_score_sample(task, one, steps, names) for one in results]
        for spec in task.metrics:
            metric = get_metric(task.kind, spec)
            name = metric.name + (f"/{filter_name}" if filter_name else "")
            numbers = [
                (0.0, 1.0) if one.rejection and not metric.corpus else metric.sample_statistics(sample)
                for one, (sample, _) in zip(results, scored, strict=True)
            ]
            metrics[name] = metric
            found = bootstrap_interval(numbers, metric.aggregate, groups=groups)
            values[name] = exact_interval(found, len(sum_by_group(numbers, groups))) if metric.percent else found
            for sample, row in zip(samples, numbers, strict=True):
                sample["scores"][name] = _compute_single(metric, row)
        for sample, (outcome, reason) in zip(samples, scored, strict=True):
            if isinstance(outcome, GeneratedSample):
                sample.setdefault("answers", {})[filter_name] = list(outcome.answers)
                sample["reason"] = sample["reason"] or reason
    first = next(iter(metrics))
    for sample in samples:
        sample["score"] = sample["scores"][first]
        if not sample["reason"] and sample["score"] < 1 and task.kind == "choice":
            sample["reason"] = f"chose {sample['chosen']!r}"
    return EvaluationResult(metrics, values, samples)


def _compute_single(metric: Metric, numbers: Sequence[float]) -> float:
    """Compute a metric on a single sample."""
    import numpy as np

    return float(metric.aggregate(np.asarray(numbers, dtype=float)))


def _prompt(question: Question) -> tuple[Message, ...]:
    return question.turns[0] if question.turns else (Message("user", question.plain[0]),)


def _score_sample(task: Task, one: QuestionResult, steps: Sequence[Any], names: Sequence[str]) -> tuple[Any, str]:
    """Return (the input of the metrics, the reason why the sample is wrong)."""
    question = one.question
    if task.kind == "choice":
        return ChoiceSample([f.logprob for f in one.continuations], question.choices, question.gold), ""
    if task.kind != "generate":
        if task.kind == "likelihood":  # of several right answers, the most probable one
            best = max(one.continuations, key=lambda f: f.logprob)
            return (
                LikelihoodSample(
                    best.logprob,
                    best.tokens,
                    any(f.greedy for f in one.continuations),
                    question.options[one.continuations.index(best)],
                ),
                "",
            )
        return LikelihoodSample(
            sum(f.logprob for f in one.continuations),
            sum(f.tokens for f in one.continuations),
            False,
            question.plain[0],
        ), ""
    answers: list[str] = []
    scores: dict[str, list[float]] = {}
    reason = ""
    for record in one.records:
        try:
            answers.append(extract(steps, question.prefix + record.text if question.prefix and names else record.text))
        except PatternTimeout as slow:
            answers.append("")
            reason = f"extract: {slow}"
    for name in names:
        found = [get_score_function(name)(_prompt(question), answer, question.row) for answer in answers]
        scores[name] = [score.value for score in found]
        reason = reason or next((score.reason for score in found if score.reason), "")
    return GeneratedSample(answers, question.references, scores), reason


def _build_sample_record(task: Task, one: QuestionResult) -> dict[str, Any]:
    """Build the stored record of one sample: question, response and cost."""
    question = one.question
    sample: dict[str, Any] = {
        "id": question.id,
        "group": question.group,
        "question": question.shown,
        "reference": " | ".join(question.references),
        "reason": f"refused: {one.rejection}" if one.rejection else "",
        "scores": {},
        "cut": one.truncated_tokens,
        "read": one.prompt_hash,
    }
    sample["row"] = hashlib.sha256(
        json.dumps({k: v for k, v in question.row.items() if k != "answer"}, sort_keys=True, default=str).encode()
    ).hexdigest()[:12]
    sample["prompt_digest"] = hashlib.sha256(
        repr(
            (
                question.plain,
                [[(m.role, m.content) for m in turns] for turns in question.turns],
                question.prefix,
                question.options,
            )
        ).encode()
    ).hexdigest()[:12]
    if one.records:
        first = one.records[0]
        sample |= {
            "text": first.text,
            "finish": first.finish,
            "prompt_tokens": sum(r.prompt_tokens for r in one.records),
            "completion_tokens": sum(r.completion_tokens for r in one.records),
        }
        sample["seconds"] = sum(r.seconds for r in one.records)
        if len(one.records) > 1:
            sample["texts"] = [r.text for r in one.records]
        return sample
    logprobs = [f.logprob for f in one.continuations]
    sample |= {
        "logprobs": logprobs,
        "tokens": [f.tokens for f in one.continuations],
        "seconds": sum(f.seconds for f in one.continuations),
    }
    if task.kind == "choice":
        best = logprobs.index(max(logprobs))
        sample |= {
            "choices": list(question.choices),
            "gold": list(question.gold),
            "chosen": question.choices[best],
            "text": question.choices[best],
        }
    else:
        sample |= {
            "text": question.options[0] if task.kind == "likelihood" else "",
            "greedy": [f.greedy for f in one.continuations],
        }
    return sample


def write_report(
    task: Task, model: Model | Adapter, result: EvaluationResult, protocol: Mapping[str, Any], ctx: Context
) -> Report:
    """Write the report and return it with its metrics."""
    samples, name = result.samples, next(iter(result.values))
    metric, score = result.metrics[name], result.values[name]
    seconds = sum(s["seconds"] for s in samples)
    metrics: dict[str, Any] = {
        "score": score.value,
        "low": score.low,
        "high": score.high,
        "metric": name,
        "samples": len(samples),
        "seconds": round(seconds, 2),
    }
    metrics |= {f"{n}": v.value for n, v in result.values.items()}
    if task.kind == "generate":
        metrics |= _costs(samples, seconds, model)
    if cut := sum(s["cut"] > 0 for s in samples):
        metrics["truncated_prompts"] = cut
    value, between = _format_interval(metric, score)
    shots = (
        f", {task.shots.count} few-shot example{'s' if task.shots.count > 1 else ''} in the prompt"
        if task.shots.count
        else ""
    )
    report = ctx.report
    report.title = f"{task.name} on {model.name}{shots}"
    report.subtitle = f"{task.what or name}: {value} (95% interval {between}) on {len(samples)} samples."
    report.data = {
        "task": task.name,
        "model": model.name,
        "shots": task.shots.count,
        "kind": task.kind,
        "metric": name,
        "better": metric.better,
        "percent": metric.percent,
        "protocol": dict(protocol),
        "definition": task.model_dump(),
        "metrics": metrics,
        "intervals": {n: {"value": v.value, "low": v.low, "high": v.high} for n, v in result.values.items()},
        "samples": [{k: v for k, v in s.items() if k != "seconds"} for s in samples],
    }
    report.add_table(
        "Metrics",
        ("metric", "value", "95% interval"),
        [(n, *_format_interval(result.metrics[n], v)) for n, v in result.values.items()],
        _describe_intervals(result, samples),
    )
    _describe_groups(result, name, report)
    report.add_table("Summary", ("name", "value"), list(metrics.items()))
    if task.kind != "perplexity":
        _describe_errors(samples, report)
    report.add_samples("Samples", [_format_sample(s) for s in samples[:SHOWN]])
    report.add_table("Prompt settings", ("setting", "value"), [(k, str(v)) for k, v in protocol.items()])
    return Report(ctx.out, metrics=metrics, about={"task": task.name, "shots": task.shots.count, "model": model.digest})


def _costs(samples: Sequence[Mapping[str, Any]], seconds: float, model: Model | Adapter) -> dict[str, Any]:
    tokens, read = sum(s["completion_tokens"] for s in samples), sum(s["prompt_tokens"] for s in samples)
    costs: dict[str, Any] = {
        "prompt_tokens": read,
        "completion_tokens": tokens,
        "completion_tokens_per_second": round(tokens / seconds, 2) if seconds else 0.0,
        "truncated": sum(s["finish"] == "length" for s in samples),
    }
    if refused := sum(s["finish"] == "refused" for s in samples):
        costs["refused"] = refused
    if isinstance(model, Model) and model.format == "http":
        options = parse_remote(model.ref)[2]
        if options.input_price or options.output_price:
            costs["cost"] = round(UsageMeter(options.input_price, options.output_price).compute_cost(read, tokens), 6)
    return costs


def _format_interval(metric: Metric, found: MetricInterval) -> tuple[str, str]:
    form = "{:.1%}" if metric.percent else "{:.4g}"
    return form.format(found.value), f"{form.format(found.low)} to {form.format(found.high)}"


def _describe_intervals(result: EvaluationResult, samples: Sequence[Mapping[str, Any]]) -> str:
    groups = {s["group"] for s in samples}
    if not groups - {""}:
        return "Intervals by bootstrap over samples."
    few = "" if len(groups) >= FEW_GROUPS else "; with so few groups the intervals are rough"
    return f"Intervals by clustered bootstrap over {len(groups)} groups{few}."


def _describe_groups(result: EvaluationResult, name: str, report: Any) -> None:
    """Add a table of the score by group, where groups have several rows."""
    groups: dict[str, list[float]] = {}
    for sample in result.samples:
        groups.setdefault(sample["group"], []).append(sample["score"])
    if 1 < len(groups) <= 100 and len(groups) < len(result.samples):
        report.add_table(
            f"{name} by group",
            ("group", "samples", "mean"),
            [(g, len(v), round(sum(v) / len(v), 4)) for g, v in sorted(groups.items())],
        )


def _describe_errors(samples: Sequence[Mapping[str, Any]], report: Any) -> None:
    reasons: dict[str, int] = {}
    for s in samples:
        key = (s["reason"].split(":")[0].split(",")[0] or "wrong") if s["score"] < 1 else "right"
        reasons[key] = reasons.get(key, 0) + 1
    report.add_table("Why answers were wrong", ("reason", "samples"), sorted(reasons.items(), key=lambda r: -r[1])[:20])


def _format_sample(sample: Mapping[str, Any]) -> dict[str, str]:
    mark = "✓" if sample["score"] == 1 else "✗"
    if "choices" in sample:
        options = "\n".join(
            f"{'→' if c == sample['chosen'] else ' '} {'✓' if i in sample['gold'] else ' '} {p:9.3f}  {c}"
            for i, (c, p) in enumerate(
                zip(sample["choices"], sample["logprobs"][: len(sample["choices"])], strict=True)
            )
        )
        return {
            "": f"{mark} {_line(sample['question'])}",
            "question": sample["question"],
            "options": options,
            "why": sample["reason"] or "right",
        }
    if "logprobs" in sample and not sample["text"]:
        return {"": f"{sample['score']:.4g} {_line(sample['question'])}", "log-probability": str(sample["logprobs"])}
    return {
        "": f"{mark} {_line(sample['question'])}",
        "question": sample["question"],
        "answer": sample["text"],
        "reference": sample["reference"],
        "why": sample["reason"] or ("right" if sample["score"] == 1 else "another answer"),
    }


def _line(question: str) -> str:
    """Format a question on one line: its beginning and, where it is long, its end."""
    words = " ".join(question.split())
    return words if len(words) <= 130 else f"{words[:60]} … {words[-66:]}"
