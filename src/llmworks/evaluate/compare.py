"""Stage `evaluate.compare`: test whether one evaluation is better than another, sample by sample, and explain why.

For two models on one task, or one model on two engines or with two prompts. Uses a paired bootstrap over the same
samples; each differing sample is attributed to its first cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.evaluate.leaderboard import format_p_value
from llmworks.evaluate.statistics.bootstrap import RESAMPLES, holm, paired_difference, sign_flip
from llmworks.evaluate.statistics.difference_causes import CAUSES, find_cause, list_changes, list_setting_differences
from llmworks.evaluate.statistics.metrics import GENERATION_METRICS
from llmworks.evaluate.statistics.read_evaluation import read_evaluation
from llmworks.tokenize.chat.templates import parse_tool_calls

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

SHOWN = 400


class CompareEvaluationsConfig(Config):
    """Bootstrap settings."""

    bootstrap_iters: int = Field(RESAMPLES, ge=100, description="number of bootstrap resamples")
    seed: int = Field(0, description="bootstrap seed")


def compare(config: CompareEvaluationsConfig, before: Report, after: Report, ctx: Context) -> Report:
    """Compute the mean difference `after - before` with a 95% interval, and list the differing samples by cause.

    Metrics: difference, low, high, p_not_better, p_not_worse, gained, lost, samples, num_differing,
    answer_agreement.
    Errors: DataError when the two reports do not have the same samples and task.
    """
    a, b = (read_evaluation(report, "task", of_samples=("question", "score", "text")) for report in (before, after))
    left, right = ({s["id"]: s for s in data["samples"]} for data in (a, b))
    _check_comparable(before.name, after.name, a, b, left, right)
    ids = sorted(left)
    groups = [str(left[i].get("group", "")) for i in ids]
    scores = [left[i]["score"] for i in ids], [right[i]["score"] for i in ids]
    paired = paired_difference(*scores, groups=groups, seed=config.seed, resamples=config.bootstrap_iters)
    p_value = sign_flip(*scores, groups=groups, seed=config.seed)
    d, sign = paired.difference, -1 if a.get("better") == "lower" else 1
    gained = sum(sign * right[i]["score"] > sign * left[i]["score"] for i in ids)
    lost = sum(sign * right[i]["score"] < sign * left[i]["score"] for i in ids)
    one, other = _reduce_answers(a, left), _reduce_answers(b, right)
    changed = [i for i in ids if one[i] != other[i] or left[i]["score"] != right[i]["score"]]
    metrics = {
        "difference": d.value,
        "low": d.low,
        "high": d.high,
        "p_not_better": paired.p_not_better,
        "p_not_worse": paired.p_not_worse,
        "p": p_value,
        "gained": gained,
        "lost": lost,
        "samples": len(ids),
        "num_differing": len(changed),
        "answer_agreement": sum(one[i] == other[i] for i in ids) / len(ids),
    }
    low, high = sorted((sign * d.low, sign * d.high))
    verdict = "better" if low > 0 else "worse" if high < 0 else "not significantly different"
    verdict = verdict if p_value < 0.05 else "not significantly different"
    page = ctx.report
    form = "{:+.1%}" if a.get("percent", True) else "{:+.4g}"
    formatted, between = form.format(d.value), f"{form.format(d.low)} to {form.format(d.high)}"
    page.title = f"{after.name} vs. {before.name}"
    page.subtitle = (
        f"{after.name} is {verdict}: {formatted} (95% interval {between}) over {len(ids)} paired samples;"
        f" {gained} gained, {lost} lost. Identical answers: {metrics['answer_agreement']:.1%}."
    )
    page.add_table("Paired bootstrap", ("statistic", "value"), list(metrics.items()))
    _describe_metrics(config, left, right, ids, groups, page)
    causes = _describe_causes(a, b, changed, page, metrics, before, after, left, right)
    _describe_samples(changed, page, left, right, sign, causes, before, after)
    page.data = {
        "before": before.name,
        "after": after.name,
        "verdict": verdict,
        "percent": a.get("percent", True),
        "metrics": metrics,
        "differing": [
            {"id": i, "cause": causes.get(i, ""), "before": left[i]["score"], "after": right[i]["score"]}
            for i in changed
        ],
    }
    return Report(ctx.out, metrics=metrics, about={"verdict": verdict})


def _describe_causes(
    a: dict[str, Any],
    b: dict[str, Any],
    changed: list[Any],
    page: ReportBuilder,
    metrics: dict[str, Any],
    before: Report,
    after: Report,
    left: dict[Any, Any],
    right: dict[Any, Any],
) -> dict[Any, str]:
    """Attribute each differing sample to a cause; add tables of causes and of differing settings."""
    causes = (
        {i: find_cause(a, b, left[i], right[i]) for i in changed} if "definition" in a and "definition" in b else {}
    )
    if causes:
        counted = Counter(causes.values()).most_common()
        several = list_changes(a, b)
        note = (
            f" {len(several)} settings differ ({', '.join(several)}): their individual effects cannot be separated;"
            " change one at a time."
            if len(several) > 1
            else ""
        )
        page.add_table(
            "Why samples differ",
            ("cause", "samples", "description"),
            [(c, n, CAUSES[c]) for c, n in counted],
            f"The first cause found, in the order from prompt to score.{note}",
        )
        metrics["causes"] = dict(counted)
    if causes or ("definition" in a and "definition" in b):
        differing = list_setting_differences(a, b)
        page.add_table(
            "Settings that differ",
            ("setting", before.name, after.name),
            differing or [("nothing", "", "")],
        )
    return causes


def _describe_samples(
    changed: list[Any],
    page: ReportBuilder,
    left: dict[Any, Any],
    right: dict[Any, Any],
    sign: int,
    causes: dict[Any, str],
    before: Report,
    after: Report,
) -> None:
    """Add the differing samples side by side."""
    items = [
        (
            _format_headline(left[i], right[i], sign, causes.get(i, "")),
            (before.name, _format_sample(left[i])),
            (after.name, _format_sample(right[i])),
        )
        for i in changed[:SHOWN]
    ]
    tags = [_tags(left[i], right[i], sign, causes.get(i, "")) for i in changed[:SHOWN]]
    page.add_pairs(
        "Samples that differ", items, f"The first {SHOWN} of {len(changed)}." if len(changed) > SHOWN else "", tags
    )


def _check_comparable(
    first: str,
    second: str,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    left: Mapping[str, Any],
    right: Mapping[str, Any],
) -> None:
    if a["task"] != b["task"] or set(left) != set(right):
        raise DataError(
            f"{first} and {second} do not have the same task and samples ({a['task']}: {len(left)}, {b['task']}:"
            f" {len(right)}), so they cannot be paired"
        )
    if a.get("metric") != b.get("metric"):
        raise DataError(
            f"{first} and {second} differ in metric ({a.get('metric')}, {b.get('metric')}), so they cannot be paired"
        )
    by = "row" if all("row" in s for s in (*left.values(), *right.values())) else "question"
    other = next((i for i in sorted(left) if left[i][by] != right[i][by]), None)
    if other is not None:
        raise DataError(f"{first} and {second} have different rows under the id {other!r}, so they cannot be paired")


def _reduce_answers(run: Mapping[str, Any], samples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Reduce each sample to what is compared: the chosen option, the extracted answers, else text or score.

    Of text scored as a whole by a function (calls, programs, constraints): the calls in it, or the scores; another
    wording is not another answer.
    """
    task = run.get("definition", {})
    scored_whole = (
        task.get("kind") == "generate"
        and not any(task.get("extract", {}).values())
        and all(str(m.get("name")) not in GENERATION_METRICS for m in task.get("metrics", ()))
    )
    out: dict[str, Any] = {}
    for id, sample in samples.items():
        if "chosen" in sample:
            out[id] = sample["chosen"]
        elif scored_whole:
            calls = parse_tool_calls(sample["text"])[1]
            out[id] = [(call.name, call.arguments) for call in calls] or sample.get("scores") or sample["score"]
        else:
            out[id] = sample.get("answers") or sample["text"] or sample["score"]
    return out


def _describe_metrics(
    config: CompareEvaluationsConfig,
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    ids: list[str],
    groups: list[str],
    page: Any,
) -> None:
    """Add all shared metrics, with p-values adjusted for multiple tests."""
    names = [n for n in left[ids[0]].get("scores", {}) if n in right[ids[0]].get("scores", {})]
    if len(names) < 2:
        return
    found = [
        paired_difference(
            [left[i]["scores"][n] for i in ids],
            [right[i]["scores"][n] for i in ids],
            groups=groups,
            seed=config.seed,
            resamples=config.bootstrap_iters,
        )
        for n in names
    ]
    p_values = [
        sign_flip(
            [left[i]["scores"][n] for i in ids], [right[i]["scores"][n] for i in ids], groups=groups, seed=config.seed
        )
        for n in names
    ]
    rows = [
        (
            n,
            f"{p.difference.value:+.4g}",
            f"{p.difference.low:+.4g} to {p.difference.high:+.4g}",
            format_p_value(c),
            format_p_value(h),
        )
        for n, p, c, h in zip(names, found, p_values, holm(p_values), strict=True)
    ]
    page.add_table(
        "All metrics",
        ("metric", "difference", "95% interval", "p", "adjusted p"),
        rows,
        f"{len(names)} metrics are tested: the adjusted p corrects for that (Holm).",
    )


def _format_headline(left: Mapping[str, Any], right: Mapping[str, Any], sign: int, why: str) -> str:
    mark = {1: "+", -1: "−", 0: "·"}[
        (sign * right["score"] > sign * left["score"]) - (sign * right["score"] < sign * left["score"])
    ]
    return f"{mark} {f'[{why}] ' if why else ''}{left['question'][:110]}"


def _tags(left: Mapping[str, Any], right: Mapping[str, Any], sign: int, why: str) -> list[str]:
    change = sign * (right["score"] - left["score"])
    return [
        "gained" if change > 0 else "lost" if change < 0 else "same score",
        *([why] if why else []),
        *([str(left["group"])] if left.get("group") and len(str(left["group"])) < 30 else []),
    ]


def _format_sample(sample: Mapping[str, Any]) -> str:
    """Format a sample for the side-by-side view."""
    if "choices" in sample:
        return "\n".join(
            f"{'→' if c == sample['chosen'] else ' '}{'✓' if i in sample['gold'] else ' '} {p:9.3f}  {c}"
            for i, (c, p) in enumerate(zip(sample["choices"], sample["logprobs"], strict=False))
        )
    reason = f"\n\n({sample['reason']})" if sample.get("reason") else ""
    return (sample["text"] or f"log-probability {sum(sample.get('logprobs', []))}") + reason
