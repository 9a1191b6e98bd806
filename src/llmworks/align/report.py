"""The report of an alignment: what the policy came to think of the answers, on what was trained and on what was held
out.

Knows no method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmworks.align.reward_model.calibration import bins_of, expected_error, wilson
from llmworks.core.report import ReportBuilder
from llmworks.train.loop.report import smooth, thin

TIMES = 6  # of a run whose texts are shown
BOTH = (
    ("Margin", "reward of the chosen less the rejected", "margin", "eval_margin"),
    ("Ranked right", "share of pairs", "ranked", "accuracy"),
)  # heading, unit, name in steps, name in looks
Curve = tuple[str, dict[str, list[tuple[float, float]]], str]


def describe(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    set_aside: Sequence[tuple[str, str]],
) -> None:
    """Curves and figures; what was asked and answered is added by the run."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Alignment of {title}"
    report.lead = (
        f"{len(steps):,} steps; from the first tenth of them to the last the loss went from {metrics['loss_first']:.3f}"
        f" to {metrics['loss']:.3f}."
        if steps
        else ""
    )
    if looks:
        last = looks[-1]
        chosen = next((row for row in looks if row["step"] == metrics.get("best_step", -1)), last)
        if "accuracy" in chosen:
            count = chosen.get("eval_rows", 0)
            share, low, high = wilson(chosen["accuracy"] * count, count) if count else (chosen["accuracy"], 0.0, 0.0)
            report.lead += (
                f" Of {f'{count:,} ' if count else ''}held-out {'pairs' if count else 'answers'} {share:.1%} are ranked"
                f" right{f' ({low:.1%} to {high:.1%})' if count else ''}, by a margin of"
                f" {chosen['eval_margin']:+.3f}"
            )
        else:
            report.lead += (
                " Held-out answers are of one kind, so that none can be ranked above another; their loss is"
                f" {chosen['eval_loss']:.4f}"
            )
        report.lead += f" after step {chosen['step'] + 1}, whose weights these are." if chosen is not last else "."
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        "evaluations": [
            {key: row[key] for key in ("step", "eval_loss", "accuracy", "eval_margin") if key in row} for row in looks
        ],
    }
    for heading, series, y in curves(steps, looks) if steps else ():
        report.curves(heading, series, x="step", y=y)
    if set_aside:
        report.table(
            "Rows set aside",
            ("id", "reason"),
            set_aside[:50],
            f"{len(set_aside)} of them; all are in set_aside.jsonl." if len(set_aside) > 50 else "",
        )


def describe_scores(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    set_aside: Sequence[tuple[str, str]],
    seen: Sequence[tuple[float, Any]],
    kind: str,
) -> dict[str, float]:
    """The page of a model that scores: its curves, and how often it is right when it says so.

    `seen`: scores of held-out pairs (chosen, rejected), or chances and labels of steps. Returns figures.
    """
    describe(report, title, rows, metrics, config, set_aside)
    report.title = f"{'Reward model' if kind == 'whole' else 'Process reward model'} of {title}"
    if not seen:
        return {}
    report.lead = report.lead.partition(" Of held-out ")[0]  # which the sentence below says with an interval
    chances, true, low = [score for score, _ in seen], [bool(right) for _, right in seen], 0.0
    if kind == "whole":  # of the answer that scores more
        chances, true, low = (
            [1 / (1 + math.exp(-min(700.0, abs(a - b)))) for a, b in seen],
            [a > b for a, b in seen],
            0.5,
        )
    found = bins_of(chances, true, low=low)
    right = [a > b for a, b in seen] if kind == "whole" else [(score > 0.5) == label for score, label in seen]
    share, lowest, highest = wilson(sum(right), len(right))
    error = expected_error(found)
    what = "pairs are ranked" if kind == "whole" else "steps are told"
    report.lead += (
        f" Of {len(seen):,} held-out cases {share:.1%} {what} right ({lowest:.1%} to {highest:.1%}); what it says and"
        f" what is true are {error:.1%} apart (expected calibration error)."
    )
    report.curves(
        "Calibration",
        {"this model": [(b.said, b.true) for b in found], "as it should be": [(low, low), (1.0, 1.0)]},
        x="what it says",
        y="how often it is so",
        note="Held-out cases, in bins by the chance that the model gives "
        + ("the answer that it scores higher." if kind == "whole" else "a step to be right."),
    )
    report.table(
        "Calibration in figures",
        ("chance", "cases", "said", "true"),
        [(f"{b.low:.2f} to {b.high:.2f}", b.cases, f"{b.said:.3f}", f"{b.true:.3f}") for b in found],
    )
    report.data |= {
        "accuracy": share,
        "low": lowest,
        "high": highest,
        "calibration_error": error,
        "bins": [b._asdict() for b in found],
    }
    return {"accuracy": round(share, 5), "accuracy_low": round(lowest, 5), "calibration_error": round(error, 5)}


ALARM_LENGTH, ALARM_REPEATED = (
    1.5,
    0.2,
)  # longer than at first; share of runs of four tokens that stood in their answer before


def alarms(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What looks like answers that please the reward and nobody else: from the first tenth of the steps to the last."""
    tenth = max(1, len(steps) // 10)
    first, last = (
        {
            name: sum(row.get(name, 0.0) for row in part) / len(part)
            for name in ("reward", "length", "repeated", "cut", "alike")
        }
        for part in (steps[:tenth], steps[-tenth:])
    )
    found = []
    if last["length"] > ALARM_LENGTH * max(1.0, first["length"]):
        found.append(
            f"answers became {last['length'] / max(1.0, first['length']):.1f} times as long ({first['length']:.0f} to"
            f" {last['length']:.0f} tokens): look whether length is what is rewarded"
        )
    if last["repeated"] > ALARM_REPEATED and last["repeated"] > 2 * first["repeated"]:
        found.append(
            f"answers repeat themselves: {last['repeated']:.0%} of their runs of four tokens stood in them before,"
            f" {first['repeated']:.0%} at first"
        )
    if last["cut"] > 0.5:
        found.append(f"{last['cut']:.0%} of the answers do not end within max_answer, {first['cut']:.0%} at first")
    if last["alike"] > 0.8:
        found.append(
            f"in {last['alike']:.0%} of the groups all answers are worth the same, so that little is learned any more"
        )
    return found


def describe_online(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    set_aside: Sequence[tuple[str, str]],
    began: Sequence[float],
    ended: Sequence[float],
    samples: Path,
    failed: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """The page of a training on the policy's own answers.

    `began`, `ended`: rewards of greedy answers to held-out prompts before and after. Returns figures.
    """
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    tenth = max(1, len(steps) // 10)
    first, last = (sum(row["reward"] for row in part) / len(part) for part in (steps[:tenth], steps[-tenth:]))
    report.title = f"Alignment of {title} by its own answers"
    report.lead = (
        f"{len(steps):,} steps; from the first tenth of them to the last the mean reward of what was drawn went from"
        f" {first:.3f} to {last:.3f}."
    )
    figures = {"reward_first": round(first, 5), "reward": round(last, 5)}
    both = [(a, b) for a, b in zip(began, ended, strict=False) if a == a and b == b]
    figures = _describe_wins(both, figures, report)
    warnings = alarms(steps)
    if failed.exists():
        rows_failed = [json.loads(line) for line in failed.read_text(encoding="utf-8").splitlines()]
        drawn = sum(not row["evaluation"] for row in rows_failed)
        what = f"{drawn} answers that were drawn" + (
            f", and {len(rows_failed) - drawn} to held-out prompts," if len(rows_failed) > drawn else ""
        )
        warnings.append(
            f"{what} have no reward, since a function failed on them; they are in failed_rewards.jsonl, the first"
            f" reason: {rows_failed[0]['reason']}"
        )
    for warning in warnings:
        say(f"warning: {warning}")
    if warnings:
        report.text("Alarms", "\n\n".join(warnings))
    figures["alarms"] = len(warnings)
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        **figures,
        "alarms": warnings,
        "evaluations": [{"step": row["step"], "reward": row["accuracy"]} for row in looks],
    }
    for heading, series, y in online_curves(steps, looks, both):
        report.curves(heading, series, x="step", y=y)
    _describe_draws(samples, report)
    if set_aside:
        report.table("Rows set aside", ("id", "reason"), set_aside[:50])
    return figures


def _describe_wins(both: list[tuple[float, float]], figures: dict[str, Any], report: ReportBuilder) -> dict[str, Any]:
    """Add to lead and figures how often the trained policy beats its beginning on held-out prompts."""
    if both:
        won, lost = sum(b > a + 1e-9 for a, b in both), sum(b < a - 1e-9 for a, b in both)
        share, low, high = wilson(won + (len(both) - won - lost) / 2, len(both))
        figures |= {
            "eval_reward_first": round(sum(a for a, _ in both) / len(both), 5),
            "win_rate": round(share, 5),
            "win_rate_low": round(low, 5),
            "win_rate_high": round(high, 5),
        }
        report.lead += (
            f" Greedy answers to {len(both):,} held-out prompts: {figures['eval_reward_first']:.3f} before,"
            f" {sum(b for _, b in both) / len(both):.3f} after; "
            + (
                f"the policy beats its beginning in {share:.1%} ({low:.1%} to {high:.1%}; {won} better, {lost} worse, a"
                " tie is half)."
                if won or lost
                else "all are worth what they were."
            )
        )
    return figures


def _describe_draws(samples: Path, report: ReportBuilder) -> None:
    """Show what the policy wrote at a few draws; `samples` is the file that they were kept in."""
    kept = json.loads(samples.read_text(encoding="utf-8")) if samples.exists() else {}
    numbers = sorted(kept, key=int)
    shown = (
        [
            numbers[round(i * (len(numbers) - 1) / (min(TIMES, len(numbers)) - 1))]
            for i in range(min(TIMES, len(numbers)))
        ]
        if len(numbers) > 1
        else numbers
    )
    items = [
        {
            "": f"draw {int(number) + 1}, worth {one['reward']:.2f}",
            "prompt": one["prompt"],
            "answer": one["answer"] + (" ..." if one["cut"] else ""),
        }
        for number in shown
        for one in kept[number]
    ]
    if items:
        report.samples("What it wrote on the way", items, note="Drawn at the temperature of the training.")


def online_curves(
    steps: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]], both: Sequence[tuple[float, float]]
) -> list[Curve]:
    """(heading, series over steps, unit) of what is drawn."""
    wide = max(2, min(25, len(steps) // 10))

    def of(name: str) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name]) for row in steps if name in row]

    reward = {"drawn": thin(of("reward")), f"mean of {wide}": thin(smooth(of("reward"), wide))}
    if looks:
        reward["held out, greedy"] = [
            *([(0, sum(a for a, _ in both) / len(both))] if both else []),
            *((row["step"] + 1, row["accuracy"]) for row in looks),
        ]
    found: list[Curve] = [("Reward", reward, "mean")]
    parts = sorted({name for row in steps for name in row if name.startswith("reward_") and name != "reward_deviation"})
    if parts:
        found.append(
            (
                "Rewards, each",
                {name.removeprefix("reward_"): thin(smooth(of(name), wide)) for name in parts},
                f"mean of {wide} steps, without its weight",
            )
        )
    one: tuple[tuple[str, str, str], ...] = (
        ("Distance from the reference", "kl", "nats a token"),
        ("Entropy", "entropy", "nats a token"),
        ("Clipped", "clipped", "share of tokens"),
        ("Length", "length", "tokens an answer"),
        ("Cut off", "cut", "share of answers"),
        ("Repeated", "repeated", "share of runs of four tokens"),
        ("Groups without a signal", "alike", "share of prompts"),
        ("Values explain", "explained", "share of the variance of returns"),
        ("Engine and trainer", "engine_gap", "nats a token that they differ by"),
        ("Loss", "loss", ""),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Learning rate", "learning_rate", ""),
    )
    found += [(heading, {heading.lower(): thin(of(name))}, y) for heading, name, y in one if of(name)]
    seconds = {"drawing": of("drawing"), "valuing": of("valuing"), "whole step": of("seconds")}
    return [
        *found,
        ("Seconds", {name: thin(points) for name, points in seconds.items() if points}, "of a draw, of a step"),
    ]


def curves(steps: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> list[Curve]:
    """(heading, series over steps, unit) of what is drawn."""
    wide = max(2, min(50, len(steps) // 10))

    def of(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name] * factor) for row in steps if name in row]

    loss = {
        "loss": thin(of("loss")),
        f"mean of {wide}": thin(smooth(of("loss"), wide)),
        **({"held out": [(row["step"] + 1, row["eval_loss"]) for row in looks]} if looks else {}),
    }
    found: list[Curve] = [
        ("Loss", loss, "per example"),
        (
            "Rewards",
            {side: thin(smooth(of(side), wide)) for side in ("chosen", "rejected") if of(side)},
            f"mean of {wide} steps",
        ),
    ]
    for heading, y, trained, held in BOTH:
        series = {
            "in training": thin(smooth(of(trained), wide)),
            "held out": [(row["step"] + 1, row[held]) for row in looks if held in row],
        }
        if of(trained) or looks:
            found.append((heading, {key: points for key, points in series.items() if points}, y))
    for heading, name, y in (
        ("Distance from the reference", "distance", "nats an answer"),
        ("Entropy", "entropy", "nats a token of the answers"),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Learning rate", "learning_rate", ""),
    ):
        if of(name):
            found.append((heading, {heading.lower(): thin(of(name))}, y))
    most = list(accumulate((value for _, value in of("memory", 1e-9)), max))
    found.append(
        (
            "Memory",
            {"memory": thin([(row["step"] + 1, value) for row, value in zip(steps, most, strict=True)])},
            "most so far, GB",
        )
    )
    return [
        *found,
        (
            "Speed",
            {
                "mean of 10": thin(
                    smooth([(row["step"] + 1, row["tokens"] / max(row["seconds"], 1e-9)) for row in steps])
                )
            },
            "tokens per second",
        ),
    ]
