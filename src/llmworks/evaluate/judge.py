"""Stage `evaluate.judge`: LLM-as-a-judge: grade answers or compare them pairwise, with one judge or a jury.

Pairs are shown in both orders; a judge whose verdict changes with the order counts as a tie. The report shows how far
judges can be trusted: agreement with each other and with human labels, and position, length and self-preference bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import Message, Request, Sampling
from llmworks.evaluate.statistics import agreement
from llmworks.evaluate.statistics.bootstrap import mean_interval
from llmworks.evaluate.statistics.judges import (
    JudgeVerdicts,
    describe_agreement,
    describe_biases,
    describe_human_agreement,
)
from llmworks.evaluate.statistics.labels import read_labels
from llmworks.evaluate.statistics.read_evaluation import read_evaluation
from llmworks.evaluate.statistics.reward_judge import RewardJudge, is_reward_model
from llmworks.generate.remote.journal import Journal, JournalRecord
from llmworks.score.judge import MAX_GRADE, comparison_prompt, grading_prompt, parse_choice, parse_grade

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.evaluate.statistics.bootstrap import MetricInterval

SHOWN = 60


class JudgeConfig(Config):
    """What judges are asked, and how."""

    criteria: str = Field(
        "", description="criteria, in a phrase; default: does the answer do what was asked, right, complete and clear"
    )
    reference: Literal["auto", "never"] = Field(
        "auto", description="auto: show the judge the row's reference answer where there is one"
    )
    max_tokens: int = Field(256, gt=0, description="maximum new tokens of a verdict")
    limit: int | None = Field(None, gt=0, description="judge only the first samples")


def judge(
    config: JudgeConfig,
    answers: Report,
    judges: dict[str, Model],
    ctx: Context,
    baseline: Report | None = None,
    labels: Dataset | None = None,
) -> Report:
    """Grade the answers of an evaluation, or compare them pairwise with those of `baseline` (A: `answers`, B:
    `baseline`).

    `labels`: human verdicts, rows of {id, label}, with `rater` where several people judged: a grade from 1 to 10, or
    A, B, C (tie).
    Metrics: score (mean grade, or win rate with ties counted half), low, high, unparsed (verdicts), and kappa
    where there are labels.
    Errors: DataError for evaluations without generated answers or of different rows, contradictory labels, or no
    verdict at all.
    """
    samples = _read_samples(answers, config.limit)
    others = _read_baseline(baseline, config, samples, answers)
    people = None if labels is None else read_labels(labels, set(samples), pairs=others is not None)
    judge_verdicts = [_run_judge(config, name, model, samples, others, ctx) for name, model in judges.items()]
    _require_verdicts(judge_verdicts, others)
    page = ctx.report
    jury = _aggregate_jury(judge_verdicts, samples, pairs=others is not None)
    if not jury:
        raise DataError("no answer has a grade: reward models have no fixed scale; add an LLM judge, or use --baseline")
    values = {i: {"A": 1.0, "B": 0.0, "C": 0.5}[v] if others is not None else v for i, v in jury.items()}
    score = mean_interval(list(values.values()), groups=[str(samples[i].get("group", "")) for i in values])
    metrics: dict[str, Any] = {"score": score.value, "low": score.low, "high": score.high} | {
        "samples": len(samples),
        "num_judged": len(values),
        "unparsed": sum(one.unparsable for one in judge_verdicts),
    }
    metrics |= _describe_score(others, page, answers, judges, score, values, baseline, jury)
    page.add_table(
        "Judges",
        ("judge", "verdicts", "unparsable", "mean"),
        [
            (one.name, len(one.verdicts), one.unparsable, _format_mean(one, pairs=others is not None))
            for one in judge_verdicts
        ],
    )
    if others is not None:
        describe_biases(judge_verdicts, judges, samples, others, answers, baseline, page)
    describe_agreement(judge_verdicts, page)
    if people is not None:
        metrics |= describe_human_agreement(judge_verdicts, jury, people, page, pairs=others is not None)
    page.add_samples("Verdicts", [_format_sample(i, samples[i], others, judge_verdicts) for i in list(values)[:SHOWN]])
    page.data = {
        "answers": answers.name,
        "against": baseline.name if baseline else "",
        "metrics": metrics,
        "judges": {one.name: {"verdicts": one.verdicts, "orders": one.orders} for one in judge_verdicts},
        "jury": jury,
        "said": {one.name: one.responses for one in judge_verdicts},
    }
    _store_pairs(others, baseline, page, answers, jury, samples, judge_verdicts)
    return Report(ctx.out, metrics=metrics, about={"model": answers.about.get("model", "")})


def _read_baseline(
    against: Report | None, config: JudgeConfig, samples: dict[str, dict[str, Any]], answers: Report
) -> dict[str, dict[str, Any]] | None:
    """Read the samples of the baseline evaluation. DataError where its questions differ."""
    others = None if against is None else _read_samples(against, config.limit)
    if others is not None and {i: s["question"] for i, s in samples.items()} != {
        i: s["question"] for i, s in others.items()
    }:
        raise DataError(
            f"{answers.name} and {against.name if against else ''} do not have the same questions, so their answers"
            " cannot be compared"
        )
    return others


def _require_verdicts(judge_verdicts: list[JudgeVerdicts], others: dict[str, dict[str, Any]] | None) -> None:
    """Raise DataError where no judge gave a verdict."""
    if not any(one.verdicts for one in judge_verdicts):
        example = next((text for one in judge_verdicts for text in one.responses.values()), "")
        form = "[[A]], [[B]] or [[C]]" if others is not None else "a grade in double brackets, such as [[7]]"
        raise DataError(
            f"no judge gave a verdict; the first response: {' '.join(example.split())[:100]!r}; expected {form}; use a"
            " stronger judge"
        )


def _describe_score(
    others: dict[str, dict[str, Any]] | None,
    page: ReportBuilder,
    answers: Report,
    judges: dict[str, Model],
    score: MetricInterval,
    values: dict[str, float | Any],
    against: Report | None,
    jury: dict[str, Any],
) -> dict[str, int]:
    """Write title and lead; return wins, losses and ties of a comparison."""
    if others is None:
        page.title = f"{answers.name}, graded by {', '.join(judges)}"
        page.subtitle = (
            f"Mean grade {1 + score.value * (MAX_GRADE - 1):.2f} of {MAX_GRADE} (95% interval"
            f" {1 + score.low * (MAX_GRADE - 1):.2f} to"
            f" {1 + score.high * (MAX_GRADE - 1):.2f}) over {len(values)} answers."
        )
        return {}
    wins = [sum(v == letter for v in jury.values()) for letter in "ABC"]
    page.title = f"{answers.name} vs. {against.name if against else ''}, judged by {', '.join(judges)}"
    page.subtitle = (
        f"{answers.name} has a win rate of {score.value:.1%} (95% interval {score.low:.1%} to {score.high:.1%}, ties"
        f" count half): {wins[0]} wins, {wins[1]} losses, {wins[2]} ties or undecided, of {len(values)}."
    )
    return {"wins": wins[0], "losses": wins[1], "ties": wins[2]}


def _store_pairs(
    others: dict[str, dict[str, Any]] | None,
    against: Report | None,
    page: ReportBuilder,
    answers: Report,
    jury: dict[str, Any],
    samples: dict[str, dict[str, Any]],
    judge_verdicts: list[JudgeVerdicts],
) -> None:
    """Store what `evaluate.arena` needs of each compared pair."""
    if others is not None and against is not None:
        page.data["models"] = [answers.read().get("model", answers.name), against.read().get("model", against.name)]
        page.data["pairs"] = [
            {
                "id": i,
                "question": samples[i]["question"],
                "lengths": [len(samples[i]["text"]), len(others[i]["text"])],
                "verdicts": {one.name: one.verdicts[i] for one in judge_verdicts if i in one.verdicts},
            }
            for i in jury
        ]


def _read_samples(report: Report, limit: int | None) -> dict[str, dict[str, Any]]:
    samples = read_evaluation(report, of_samples=("question",))["samples"]
    if "text" not in samples[0] or "logprobs" in samples[0]:
        raise DataError(f"{report.name}: has no generated answers; judges need evaluations of tasks of kind generate")
    return {s["id"]: s for s in samples[:limit]}


def _run_judge(
    config: JudgeConfig,
    name: str,
    model: Model | Adapter,
    samples: Mapping[str, Any],
    others: Mapping[str, Any] | None,
    ctx: Context,
) -> JudgeVerdicts:
    if isinstance(model, Model) and is_reward_model(model):
        return _run_reward_judge(name, RewardJudge(model.path), samples, others)
    prompts: dict[str, str] = {}
    for id, sample in samples.items():
        turns, reference = (
            (Message("user", sample["question"]),),
            sample.get("reference", "") if config.reference == "auto" else "",
        )
        if others is None:
            prompts[id] = grading_prompt(turns, sample["text"], config.criteria, reference)
        else:
            prompts[f"{id} AB"] = comparison_prompt(
                turns, sample["text"], others[id]["text"], config.criteria, reference
            )
            prompts[f"{id} BA"] = comparison_prompt(
                turns, others[id]["text"], sample["text"], config.criteria, reference
            )
    requests = {
        key: Request((Message("user", text),), sampling=Sampling(max_tokens=config.max_tokens))
        for key, text in prompts.items()
    }
    with (
        Journal(ctx.scratch / f"judged-{name}.jsonl", lambda: ctx.open_engine(model)) as journal,
        ctx.progress.bar(f"judge {name}", len(requests), "verdicts") as bar,
    ):
        replies = journal.generate(requests, bar)
    responses = {
        key: reply.text if isinstance(reply, JournalRecord) else f"(refused: {reply})" for key, reply in replies.items()
    }
    verdicts = JudgeVerdicts(name, responses=responses)
    for id in samples:
        if others is None:
            grade = parse_grade(responses[id])
            verdict: Any = grade
        else:
            first, swapped = (
                parse_choice(responses[f"{id} AB"]),
                {"A": "B", "B": "A"}.get(choice := parse_choice(responses[f"{id} BA"]), choice),
            )
            verdict = agreement.merge_verdicts(first, swapped) if first and swapped else None
            if verdict:
                verdicts.orders[id] = (first, swapped)
        if verdict is None:
            verdicts.unparsable += 1
        else:
            verdicts.verdicts[id] = verdict
    return verdicts


def _run_reward_judge(
    name: str, model: RewardJudge, samples: Mapping[str, Any], others: Mapping[str, Any] | None
) -> JudgeVerdicts:
    verdicts = JudgeVerdicts(name, unbounded=True)
    for id, sample in samples.items():
        turns = (Message("user", sample["question"]),)
        mine = model.score(turns, sample["text"])
        if others is None:
            verdicts.verdicts[id] = mine
        else:
            theirs = model.score(turns, others[id]["text"])
            verdicts.verdicts[id] = "A" if mine > theirs else "B" if theirs > mine else "C"
    return verdicts


def _aggregate_jury(
    judge_verdicts: Sequence[JudgeVerdicts], samples: Mapping[str, Any], *, pairs: bool
) -> dict[str, Any]:
    """Aggregate by sample: majority of verdicts, or mean of grades. Rewards are not grades and are left out."""
    out: dict[str, Any] = {}
    for id in samples:
        votes = [one.verdicts[id] for one in judge_verdicts if id in one.verdicts and (pairs or not one.unbounded)]
        if votes:
            out[id] = agreement.majority_vote(votes) if pairs else sum(votes) / len(votes)
    return out


def _format_mean(one: JudgeVerdicts, *, pairs: bool) -> str:
    values = [{"A": 1.0, "B": 0.0, "C": 0.5}[v] if pairs else v for v in one.verdicts.values()]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return (
        f"{mean:.1%} win rate"
        if pairs
        else f"reward {mean:.4g}"
        if one.unbounded
        else f"{1 + mean * (MAX_GRADE - 1):.2f}"
    )


def _format_sample(
    id: str, sample: Mapping[str, Any], others: Mapping[str, Any] | None, judge_verdicts: Sequence[JudgeVerdicts]
) -> dict[str, str]:
    verdicts = ", ".join(f"{one.name}: {_format_verdict(one, id, pairs=others is not None)}" for one in judge_verdicts)
    shown = {"": f"{verdicts}  {sample['question'][:90]}", "answer" if others is None else "A": sample["text"]}
    if others is not None:
        shown["B"] = others[id]["text"]
    return {
        **shown,
        **{
            f"{one.name} said": "\n\n".join(
                text for key, text in one.responses.items() if key in (id, f"{id} AB", f"{id} BA")
            )
            for one in judge_verdicts
            if one.responses
        },
    }


def _format_verdict(one: JudgeVerdicts, id: str, *, pairs: bool) -> str:
    if id not in one.verdicts:
        return "no verdict"
    value = one.verdicts[id]
    return str(value) if pairs else f"{value:.3g}" if one.unbounded else f"{1 + value * (MAX_GRADE - 1):.3g}"
