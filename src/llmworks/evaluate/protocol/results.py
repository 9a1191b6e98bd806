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
from llmworks.evaluate.protocol.ask import Answered
from llmworks.evaluate.protocol.extract import Slow, extract
from llmworks.evaluate.protocol.questions import Question
from llmworks.evaluate.protocol.task import Task
from llmworks.evaluate.statistics.bootstrap import Interval, certain, grouped, interval
from llmworks.evaluate.statistics.metrics import Choice, Metric, Text, Written, metric_of, score_functions
from llmworks.generate.remote.endpoint import parse_remote
from llmworks.generate.remote.usage import Account
from llmworks.score import score_function

SHOWN, FEW = 40, 20


@dataclass(frozen=True)
class Measured:
    """All metrics of a run with their intervals (the first is the score), and the stored samples."""

    metrics: dict[str, Metric]
    values: dict[str, Interval]
    samples: list[dict[str, Any]]


def measure(task: Task, answered: Sequence[Answered], asked: Sequence[Question]) -> Measured:
    """Score the responses.

    Without responses only the rows are checked: DataError for one whose own reference cannot be scored.
    """
    names = score_functions(task.metrics) if task.kind == "generate" else []
    if not answered:
        for question in asked:
            reference = question.references[0] if question.references else ""
            for name in names:
                score_function(name)(_prompt(question), reference, question.row)
        return Measured({}, {}, [])
    metrics: dict[str, Metric] = {}
    values: dict[str, Interval] = {}
    samples = [_sample(task, one) for one in answered]
    groups = [one.question.group for one in answered]
    for way, steps in task.extract.items():
        judged = [_judged(task, one, steps, names) for one in answered]
        for spec in task.metrics:
            metric = metric_of(task.kind, spec)
            name = metric.name + (f"/{way}" if way else "")
            numbers = [
                (0.0, 1.0) if one.refused and not metric.corpus else metric.numbers(sample)
                for one, (sample, _) in zip(answered, judged, strict=True)
            ]
            metrics[name] = metric
            found = interval(numbers, metric.value, groups=groups)
            values[name] = certain(found, len(grouped(numbers, groups))) if metric.percent else found
            for sample, row in zip(samples, numbers, strict=True):
                sample["scores"][name] = _alone(metric, row)
        for sample, (outcome, reason) in zip(samples, judged, strict=True):
            if isinstance(outcome, Written):
                sample.setdefault("answers", {})[way] = list(outcome.answers)
                sample["reason"] = sample["reason"] or reason
    first = next(iter(metrics))
    for sample in samples:
        sample["score"] = sample["scores"][first]
        if not sample["reason"] and sample["score"] < 1 and task.kind == "choice":
            sample["reason"] = f"chose {sample['chosen']!r}"
    return Measured(metrics, values, samples)


def _alone(metric: Metric, numbers: Sequence[float]) -> float:
    """Compute a metric on a single sample."""
    import numpy as np

    return float(metric.value(np.asarray(numbers, dtype=float)))


def _prompt(question: Question) -> tuple[Message, ...]:
    return question.turns[0] if question.turns else (Message("user", question.plain[0]),)


def _judged(task: Task, one: Answered, steps: Sequence[Any], names: Sequence[str]) -> tuple[Any, str]:
    """Return (the input of the metrics, the reason why the sample is wrong)."""
    question = one.question
    if task.kind == "choice":
        return Choice([f.logprob for f in one.found], question.choices, question.gold), ""
    if task.kind != "generate":
        if task.kind == "likelihood":  # of several right answers, the most probable one
            best = max(one.found, key=lambda f: f.logprob)
            return (
                Text(
                    best.logprob, best.tokens, any(f.greedy for f in one.found), question.options[one.found.index(best)]
                ),
                "",
            )
        return Text(sum(f.logprob for f in one.found), sum(f.tokens for f in one.found), False, question.plain[0]), ""
    answers: list[str] = []
    scores: dict[str, list[float]] = {}
    reason = ""
    for record in one.records:
        try:
            answers.append(extract(steps, question.prefix + record.text if question.prefix and names else record.text))
        except Slow as slow:
            answers.append("")
            reason = f"extract: {slow}"
    for name in names:
        found = [score_function(name)(_prompt(question), answer, question.row) for answer in answers]
        scores[name] = [score.value for score in found]
        reason = reason or next((score.reason for score in found if score.reason), "")
    return Written(answers, question.references, scores), reason


def _sample(task: Task, one: Answered) -> dict[str, Any]:
    """Build the stored record of one sample: question, response and cost."""
    question = one.question
    sample: dict[str, Any] = {
        "id": question.id,
        "group": question.group,
        "question": question.shown,
        "reference": " | ".join(question.references),
        "reason": f"refused: {one.refused}" if one.refused else "",
        "scores": {},
        "cut": one.cut,
        "read": one.read,
    }
    sample["row"] = hashlib.sha256(
        json.dumps({k: v for k, v in question.row.items() if k != "answer"}, sort_keys=True, default=str).encode()
    ).hexdigest()[:12]
    sample["asked"] = hashlib.sha256(
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
    logprobs = [f.logprob for f in one.found]
    sample |= {
        "logprobs": logprobs,
        "tokens": [f.tokens for f in one.found],
        "seconds": sum(f.seconds for f in one.found),
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
            "greedy": [f.greedy for f in one.found],
        }
    return sample


def write_report(
    task: Task, model: Model | Adapter, made: Measured, protocol: Mapping[str, Any], ctx: Context
) -> Report:
    """Write the report and return it with its metrics."""
    samples, name = made.samples, next(iter(made.values))
    metric, score = made.metrics[name], made.values[name]
    seconds = sum(s["seconds"] for s in samples)
    metrics: dict[str, Any] = {
        "score": score.value,
        "low": score.low,
        "high": score.high,
        "metric": name,
        "samples": len(samples),
        "seconds": round(seconds, 2),
    }
    metrics |= {f"{n}": v.value for n, v in made.values.items()}
    if task.kind == "generate":
        metrics |= _costs(samples, seconds, model)
    if cut := sum(s["cut"] > 0 for s in samples):
        metrics["prompts_cut"] = cut
    value, between = _shown(metric, score)
    shots = (
        f", {task.shots.count} few-shot example{'s' if task.shots.count > 1 else ''} in the prompt"
        if task.shots.count
        else ""
    )
    report = ctx.report
    report.title = f"{task.name} on {model.name}{shots}"
    report.lead = f"{task.what or name}: {value} (95% interval {between}) on {len(samples)} samples."
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
        "intervals": {n: {"value": v.value, "low": v.low, "high": v.high} for n, v in made.values.items()},
        "samples": [{k: v for k, v in s.items() if k != "seconds"} for s in samples],
    }
    report.table(
        "Metrics",
        ("metric", "value", "95% interval"),
        [(n, *_shown(made.metrics[n], v)) for n, v in made.values.items()],
        _how(made, samples),
    )
    _by_group(made, name, report)
    report.table("Summary", ("name", "value"), list(metrics.items()))
    if task.kind != "perplexity":
        _wrong(samples, report)
    report.samples("Samples", [_page(s) for s in samples[:SHOWN]])
    report.table("Prompt settings", ("setting", "value"), [(k, str(v)) for k, v in protocol.items()])
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
            costs["cost"] = round(Account(options.input_price, options.output_price).price(read, tokens), 6)
    return costs


def _shown(metric: Metric, found: Interval) -> tuple[str, str]:
    form = "{:.1%}" if metric.percent else "{:.4g}"
    return form.format(found.value), f"{form.format(found.low)} to {form.format(found.high)}"


def _how(made: Measured, samples: Sequence[Mapping[str, Any]]) -> str:
    groups = {s["group"] for s in samples}
    if not groups - {""}:
        return "Intervals by bootstrap over samples."
    few = "" if len(groups) >= FEW else "; with so few groups the intervals are rough"
    return f"Intervals by clustered bootstrap over {len(groups)} groups{few}."


def _by_group(made: Measured, name: str, report: Any) -> None:
    """Add a table of the score by group, where groups have several rows."""
    groups: dict[str, list[float]] = {}
    for sample in made.samples:
        groups.setdefault(sample["group"], []).append(sample["score"])
    if 1 < len(groups) <= 100 and len(groups) < len(made.samples):
        report.table(
            f"{name} by group",
            ("group", "samples", "mean"),
            [(g, len(v), round(sum(v) / len(v), 4)) for g, v in sorted(groups.items())],
        )


def _wrong(samples: Sequence[Mapping[str, Any]], report: Any) -> None:
    reasons: dict[str, int] = {}
    for s in samples:
        key = (s["reason"].split(":")[0].split(",")[0] or "wrong") if s["score"] < 1 else "right"
        reasons[key] = reasons.get(key, 0) + 1
    report.table("Why answers were wrong", ("reason", "samples"), sorted(reasons.items(), key=lambda r: -r[1])[:20])


def _page(sample: Mapping[str, Any]) -> dict[str, str]:
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
