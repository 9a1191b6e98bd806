"""Reports of alignments: reward and loss curves, evaluation on held-out data, calibration, reward-hacking warnings."""

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

TIMES = 6  # rollouts of a run whose samples are shown
BOTH = (
    ("Reward margin", "reward of chosen minus rejected", "margin", "eval_margin"),
    ("Reward accuracy", "share of pairs", "ranked", "accuracy"),
)  # heading, unit, training metric, evaluation metric
Curve = tuple[str, dict[str, list[tuple[float, float]]], str]


def describe(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    set_aside: Sequence[tuple[str, str]],
) -> None:
    """Write curves and metrics; the training run adds the sample completions."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Alignment of {title}"
    report.lead = (
        (
            f"{len(steps):,} steps; loss {metrics['loss_first']:.3f} in the first tenth, {metrics['loss']:.3f} in the"
            " last."
        )
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
                f" Reward accuracy on {f'{count:,} ' if count else ''}held-out"
                f" {'pairs' if count else 'completions'}:"
                f" {share:.1%}{f' ({low:.1%} to {high:.1%})' if count else ''}, mean margin"
                f" {chosen['eval_margin']:+.3f}"
            )
        else:
            report.lead += (
                f" Held-out completions all have one label, so there is no accuracy; loss {chosen['eval_loss']:.4f}"
            )
        report.lead += f" after step {chosen['step'] + 1}, the saved checkpoint." if chosen is not last else "."
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
            "Rejected rows",
            ("id", "reason"),
            set_aside[:50],
            f"{len(set_aside)} rows; all are in set_aside.jsonl." if len(set_aside) > 50 else "",
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
    """Write the report of a reward model: curves, accuracy and calibration. Return its metrics.

    `seen`: scores of held-out pairs (chosen, rejected), or probabilities and labels of steps.
    """
    describe(report, title, rows, metrics, config, set_aside)
    report.title = f"{'Reward model' if kind == 'whole' else 'Process reward model'} of {title}"
    if not seen:
        return {}
    report.lead = report.lead.partition(" Reward accuracy on ")[0]  # the sentence below gives it with an interval
    chances, true, low = [score for score, _ in seen], [bool(right) for _, right in seen], 0.0
    if kind == "whole":  # probability that the higher-scored completion wins
        chances, true, low = (
            [1 / (1 + math.exp(-min(700.0, abs(a - b)))) for a, b in seen],
            [a > b for a, b in seen],
            0.5,
        )
    found = bins_of(chances, true, low=low)
    right = [a > b for a, b in seen] if kind == "whole" else [(score > 0.5) == label for score, label in seen]
    share, lowest, highest = wilson(sum(right), len(right))
    error = expected_error(found)
    what = "pairs" if kind == "whole" else "steps"
    report.lead += (
        f" Accuracy on {len(seen):,} held-out {what}: {share:.1%} ({lowest:.1%} to {highest:.1%}); expected"
        f" calibration error {error:.1%}."
    )
    report.curves(
        "Calibration",
        {"this model": [(b.said, b.true) for b in found], "perfect calibration": [(low, low), (1.0, 1.0)]},
        x="predicted probability",
        y="observed frequency",
        note="Held-out cases, binned by the predicted probability of "
        + ("the higher-scored completion to win." if kind == "whole" else "a step to be correct."),
    )
    report.table(
        "Calibration table",
        ("probability", "cases", "predicted", "observed"),
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
)  # growth of the completion length; share of repeated 4-grams


def alarms(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Return signs of reward hacking: changes from the first tenth of the steps to the last."""
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
            f"completions grew {last['length'] / max(1.0, first['length']):.1f} times longer"
            f" ({first['length']:.0f} to {last['length']:.0f} tokens): check whether the reward favors length"
        )
    if last["repeated"] > ALARM_REPEATED and last["repeated"] > 2 * first["repeated"]:
        found.append(
            f"completions repeat themselves: {last['repeated']:.0%} of their 4-grams occurred before,"
            f" {first['repeated']:.0%} at first"
        )
    if last["cut"] > 0.5:
        found.append(
            f"{last['cut']:.0%} of the completions are truncated at max_completion_length, {first['cut']:.0%} at first"
        )
    if last["alike"] > 0.8:
        found.append(
            f"in {last['alike']:.0%} of the groups all completions have the same reward, so there is little"
            " learning signal left"
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
    """Write the report of a training on rollouts. Return its metrics.

    `began`, `ended`: rewards of greedy completions of held-out prompts before and after.
    """
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    tenth = max(1, len(steps) // 10)
    first, last = (sum(row["reward"] for row in part) / len(part) for part in (steps[:tenth], steps[-tenth:]))
    report.title = f"Alignment of {title} with online rollouts"
    report.lead = (
        f"{len(steps):,} steps; mean reward of the rollouts {first:.3f} in the first tenth, {last:.3f} in the last."
    )
    figures = {"reward_first": round(first, 5), "reward": round(last, 5)}
    both = [(a, b) for a, b in zip(began, ended, strict=False) if a == a and b == b]
    figures = _describe_wins(both, figures, report)
    warnings = alarms(steps)
    if failed.exists():
        rows_failed = [json.loads(line) for line in failed.read_text(encoding="utf-8").splitlines()]
        drawn = sum(not row["evaluation"] for row in rows_failed)
        what = f"{drawn} sampled completions" + (
            f", and {len(rows_failed) - drawn} of held-out prompts," if len(rows_failed) > drawn else ""
        )
        warnings.append(
            f"{what} have no reward because a reward function failed; they are in failed_rewards.jsonl, the first"
            f" reason: {rows_failed[0]['reason']}"
        )
    for warning in warnings:
        say(f"warning: {warning}")
    if warnings:
        report.text("Warnings", "\n\n".join(warnings))
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
        report.table("Rejected rows", ("id", "reason"), set_aside[:50])
    return figures


def _describe_wins(both: list[tuple[float, float]], figures: dict[str, Any], report: ReportBuilder) -> dict[str, Any]:
    """Add to summary and metrics how often the trained policy beats the initial one on held-out prompts."""
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
            f" Mean reward of greedy completions of {len(both):,} held-out prompts:"
            f" {figures['eval_reward_first']:.3f} before, {sum(b for _, b in both) / len(both):.3f} after; "
        ) + (
            (
                f"win rate against the initial policy {share:.1%} ({low:.1%} to {high:.1%}; {won} better, {lost}"
                " worse, a tie counts half)."
            )
            if won or lost
            else "all rewards are unchanged."
        )
    return figures


def _describe_draws(samples: Path, report: ReportBuilder) -> None:
    """Show samples of a few rollouts. `samples`: the file that they were saved in."""
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
            "": f"rollout {int(number) + 1}, reward {one['reward']:.2f}",
            "prompt": one["prompt"],
            "answer": one["answer"] + (" ..." if one["cut"] else ""),
        }
        for number in shown
        for one in kept[number]
    ]
    if items:
        report.samples("Sample completions during training", items, note="Sampled at the training temperature.")


def online_curves(
    steps: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]], both: Sequence[tuple[float, float]]
) -> list[Curve]:
    """Return (heading, series over steps, unit) of the plots."""
    wide = max(2, min(25, len(steps) // 10))

    def of(name: str) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name]) for row in steps if name in row]

    reward = {"rollouts": thin(of("reward")), f"mean of {wide}": thin(smooth(of("reward"), wide))}
    if looks:
        reward["held-out, greedy"] = [
            *([(0, sum(a for a, _ in both) / len(both))] if both else []),
            *((row["step"] + 1, row["accuracy"]) for row in looks),
        ]
    found: list[Curve] = [("Reward", reward, "mean")]
    parts = sorted({name for row in steps for name in row if name.startswith("reward_") and name != "reward_deviation"})
    if parts:
        found.append(
            (
                "Reward functions",
                {name.removeprefix("reward_"): thin(smooth(of(name), wide)) for name in parts},
                f"mean of {wide} steps, unweighted",
            )
        )
    one: tuple[tuple[str, str, str], ...] = (
        ("KL divergence from the reference", "kl", "nats per token"),
        ("Entropy", "entropy", "nats per token"),
        ("Clip ratio", "clipped", "share of tokens"),
        ("Completion length", "length", "tokens"),
        ("Truncated completions", "cut", "share of completions"),
        ("Repetition", "repeated", "share of repeated 4-grams"),
        ("Groups with zero reward variance", "alike", "share of prompts"),
        ("Explained variance", "explained", "of returns by values"),
        ("Log-probability gap of engine and trainer", "engine_gap", "nats per token"),
        ("Loss", "loss", ""),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Learning rate", "learning_rate", ""),
    )
    found += [(heading, {heading.lower(): thin(of(name))}, y) for heading, name, y in one if of(name)]
    seconds = {"sampling": of("drawing"), "scoring": of("valuing"), "whole step": of("seconds")}
    return [
        *found,
        ("Seconds", {name: thin(points) for name, points in seconds.items() if points}, "per rollout, per step"),
    ]


def curves(steps: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return (heading, series over steps, unit) of the plots."""
    wide = max(2, min(50, len(steps) // 10))

    def of(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name] * factor) for row in steps if name in row]

    loss = {
        "loss": thin(of("loss")),
        f"mean of {wide}": thin(smooth(of("loss"), wide)),
        **({"held-out": [(row["step"] + 1, row["eval_loss"]) for row in looks]} if looks else {}),
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
            "training": thin(smooth(of(trained), wide)),
            "held-out": [(row["step"] + 1, row[held]) for row in looks if held in row],
        }
        if of(trained) or looks:
            found.append((heading, {key: points for key, points in series.items() if points}, y))
    for heading, name, y in (
        ("KL divergence from the reference", "distance", "nats per completion"),
        ("Entropy", "entropy", "nats per completion token"),
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
            "peak so far, GB",
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
