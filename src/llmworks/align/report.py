"""Reports of alignments: reward and loss curves, evaluation on held-out data, calibration, reward-hacking warnings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmworks.align.reward_model.calibration import compute_bins, expected_calibration_error, wilson_interval
from llmworks.align.rl.reward_hacking import CLIPPED_RATIO, MEAN_LENGTH, ZERO_STD, find_reward_hacking
from llmworks.core.report import ReportBuilder
from llmworks.train.loop.report import smooth, subsample

NUM_SHOWN_ROLLOUTS = 6  # rollouts of a run whose samples are shown
MARGIN_CURVES = (
    ("Reward margin", "reward of chosen minus rejected", "rewards/margins", "eval_margin"),
    ("Reward accuracy", "share of pairs", "rewards/accuracies", "accuracy"),
)  # heading, unit, training metric, evaluation metric
Curve = tuple[str, dict[str, list[tuple[float, float]]], str]


def describe_preference(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    rejected: Sequence[tuple[str, str]],
) -> None:
    """Write curves and metrics; the training run adds the sample completions."""
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Alignment of {title}"
    report.subtitle = (
        (
            f"{len(steps):,} steps; loss {metrics['initial_loss']:.3f} in the first tenth, {metrics['loss']:.3f} in the"
            " last."
        )
        if steps
        else ""
    )
    if evaluations:
        last = evaluations[-1]
        saved = next((row for row in evaluations if row["step"] + 1 == metrics.get("best_step")), last)
        if "accuracy" in saved:
            count = saved.get("eval_rows", 0)
            share, low, high = (
                wilson_interval(saved["accuracy"] * count, count) if count else (saved["accuracy"], 0.0, 0.0)
            )
            report.subtitle += (
                f" Reward accuracy on {f'{count:,} ' if count else ''}held-out"
                f" {'pairs' if count else 'completions'}:"
                f" {share:.1%}{f' ({low:.1%} to {high:.1%})' if count else ''}, mean margin"
                f" {saved['eval_margin']:+.3f}"
            )
        else:
            report.subtitle += (
                f" Held-out completions all have one label, so there is no accuracy; loss {saved['eval_loss']:.4f}"
            )
        report.subtitle += f" after step {saved['step'] + 1}, the saved checkpoint." if saved is not last else "."
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        "evaluations": [
            {key: row[key] for key in ("step", "eval_loss", "accuracy", "eval_margin") if key in row}
            for row in evaluations
        ],
    }
    for heading, series, y in make_curves(steps, evaluations) if steps else ():
        report.add_curves(heading, series, x="step", y=y)
    if rejected:
        report.add_table(
            "Rejected rows",
            ("id", "reason"),
            rejected[:50],
            f"{len(rejected)} rows; all are in set_aside.jsonl." if len(rejected) > 50 else "",
        )


def describe_scores(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    rejected: Sequence[tuple[str, str]],
    eval_scores: Sequence[tuple[float, Any]],
    kind: str,
) -> dict[str, float]:
    """Write the report of a reward model: curves, accuracy and calibration. Return its metrics.

    `eval_scores`: scores of held-out pairs (chosen, rejected), or probabilities and labels of steps.
    """
    describe_preference(report, title, rows, metrics, config, rejected)
    report.title = f"{'Reward model' if kind == 'whole' else 'Process reward model'} of {title}"
    if not eval_scores:
        return {}
    report.subtitle = report.subtitle.partition(" Reward accuracy on ")[
        0
    ]  # the sentence below gives it with an interval
    probabilities, outcomes, low = [score for score, _ in eval_scores], [bool(right) for _, right in eval_scores], 0.0
    if kind == "whole":  # probability that the higher-scored completion wins
        probabilities, outcomes, low = (
            [1 / (1 + math.exp(-min(700.0, abs(a - b)))) for a, b in eval_scores],
            [a > b for a, b in eval_scores],
            0.5,
        )
    bins = compute_bins(probabilities, outcomes, low=low)
    right = (
        [a > b for a, b in eval_scores] if kind == "whole" else [(score > 0.5) == label for score, label in eval_scores]
    )
    share, lowest, highest = wilson_interval(sum(right), len(right))
    error = expected_calibration_error(bins)
    what = "pairs" if kind == "whole" else "steps"
    report.subtitle += (
        f" Accuracy on {len(eval_scores):,} held-out {what}: {share:.1%} ({lowest:.1%} to {highest:.1%}); expected"
        f" calibration error {error:.1%}."
    )
    report.add_curves(
        "Calibration",
        {"this model": [(b.predicted, b.observed) for b in bins], "perfect calibration": [(low, low), (1.0, 1.0)]},
        x="predicted probability",
        y="observed frequency",
        note="Held-out cases, binned by the predicted probability of "
        + ("the higher-scored completion to win." if kind == "whole" else "a step to be correct."),
    )
    report.add_table(
        "Calibration table",
        ("probability", "cases", "predicted", "observed"),
        [(f"{b.low:.2f} to {b.high:.2f}", b.size, f"{b.predicted:.3f}", f"{b.observed:.3f}") for b in bins],
    )
    report.data |= {"accuracy": share, "low": lowest, "high": highest}
    report.data |= {"expected_calibration_error": error, "bins": [b._asdict() for b in bins]}
    return {
        "accuracy": round(share, 5),
        "accuracy_low": round(lowest, 5),
        "expected_calibration_error": round(error, 5),
    }


def describe_online(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    rejected: Sequence[tuple[str, str]],
    initial_rewards: Sequence[float],
    final_rewards: Sequence[float],
    samples_file: Path,
    failed_file: Path,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Write the report of a training on rollouts. Return its metrics.

    `initial_rewards`, `final_rewards`: rewards of greedy completions of held-out prompts before and after.
    """
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    tenth = max(1, len(steps) // 10)
    first, last = (sum(row["reward"] for row in part) / len(part) for part in (steps[:tenth], steps[-tenth:]))
    report.title = f"Alignment of {title} with online rollouts"
    report.subtitle = (
        f"{len(steps):,} steps; mean reward of the rollouts {first:.3f} in the first tenth, {last:.3f} in the last."
    )
    report_metrics = {"initial_reward": round(first, 5), "reward": round(last, 5)}
    reward_pairs = [(a, b) for a, b in zip(initial_rewards, final_rewards, strict=False) if a == a and b == b]
    report_metrics = _describe_win_rate(reward_pairs, report_metrics, report)
    warnings = find_reward_hacking(steps)
    if failed_file.exists():
        rows_failed = [json.loads(line) for line in failed_file.read_text(encoding="utf-8").splitlines()]
        num_sampled = sum(not row["evaluation"] for row in rows_failed)
        what = f"{num_sampled} sampled completions" + (
            f", and {len(rows_failed) - num_sampled} of held-out prompts," if len(rows_failed) > num_sampled else ""
        )
        warnings.append(
            f"{what} have no reward because a reward function failed; they are in failed_rewards.jsonl, the first"
            f" reason: {rows_failed[0]['reason']}"
        )
    for warning in warnings:
        log(f"warning: {warning}")
    if warnings:
        report.add_text("Warnings", "\n\n".join(warnings))
    report_metrics["alarms"] = len(warnings)
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        **report_metrics,
        "alarms": warnings,
        "evaluations": [{"step": row["step"], "reward": row["accuracy"]} for row in evaluations],
    }
    for heading, series, y in make_online_curves(steps, evaluations, reward_pairs):
        report.add_curves(heading, series, x="step", y=y)
    _describe_samples(samples_file, report)
    if rejected:
        report.add_table("Rejected rows", ("id", "reason"), rejected[:50])
    return report_metrics


def _describe_win_rate(
    reward_pairs: list[tuple[float, float]], metrics: dict[str, Any], report: ReportBuilder
) -> dict[str, Any]:
    """Add to summary and metrics how often the trained policy beats the initial one on held-out prompts."""
    if reward_pairs:
        won, lost = sum(b > a + 1e-9 for a, b in reward_pairs), sum(b < a - 1e-9 for a, b in reward_pairs)
        share, low, high = wilson_interval(won + (len(reward_pairs) - won - lost) / 2, len(reward_pairs))
        metrics |= {
            "initial_eval_reward": round(sum(a for a, _ in reward_pairs) / len(reward_pairs), 5),
            "win_rate": round(share, 5),
            "win_rate_low": round(low, 5),
            "win_rate_high": round(high, 5),
        }
        report.subtitle += (
            f" Mean reward of greedy completions of {len(reward_pairs):,} held-out prompts:"
            f" {metrics['initial_eval_reward']:.3f} before, {sum(b for _, b in reward_pairs) / len(reward_pairs):.3f}"
            " after; "
        ) + (
            (
                f"win rate against the initial policy {share:.1%} ({low:.1%} to {high:.1%}; {won} better, {lost}"
                " worse, a tie counts half)."
            )
            if won or lost
            else "all rewards are unchanged."
        )
    return metrics


def _describe_samples(samples_file: Path, report: ReportBuilder) -> None:
    """Show samples of a few rollouts. `samples_file`: the file that they were saved in."""
    samples = json.loads(samples_file.read_text(encoding="utf-8")) if samples_file.exists() else {}
    numbers = sorted(samples, key=int)
    shown = (
        [
            numbers[round(i * (len(numbers) - 1) / (min(NUM_SHOWN_ROLLOUTS, len(numbers)) - 1))]
            for i in range(min(NUM_SHOWN_ROLLOUTS, len(numbers)))
        ]
        if len(numbers) > 1
        else numbers
    )
    items = [
        {
            "": f"rollout {int(number) + 1}, reward {one['reward']:.2f}",
            "prompt": one["prompt"],
            "answer": one["answer"] + (" ..." if one["truncated"] else ""),
        }
        for number in shown
        for one in samples[number]
    ]
    if items:
        report.add_samples("Sample completions during training", items, note="Sampled at the training temperature.")


def make_online_curves(
    steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], reward_pairs: Sequence[tuple[float, float]]
) -> list[Curve]:
    """Return (heading, series over steps, unit) of the plots."""
    smoothing_window = max(2, min(25, len(steps) // 10))

    def get_points(name: str) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name]) for row in steps if name in row]

    reward = {
        "rollouts": subsample(get_points("reward")),
        f"mean of {smoothing_window}": subsample(smooth(get_points("reward"), smoothing_window)),
    }
    if evaluations:
        reward["held-out, greedy"] = [
            *([(0, sum(a for a, _ in reward_pairs) / len(reward_pairs))] if reward_pairs else []),
            *((row["step"] + 1, row["accuracy"]) for row in evaluations),
        ]
    plots: list[Curve] = [("Reward", reward, "mean")]
    parts = sorted({name for row in steps for name in row if re.fullmatch(r"rewards/.+/mean", name)})
    if parts:
        plots.append(
            (
                "Reward functions",
                {name.split("/")[1]: subsample(smooth(get_points(name), smoothing_window)) for name in parts},
                f"mean of {smoothing_window} steps, unweighted",
            )
        )
    one: tuple[tuple[str, str, str], ...] = (
        ("KL divergence from the reference", "kl", "nats per token"),
        ("Entropy", "entropy", "nats per token"),
        ("Clip ratio", "clip_ratio", "share of tokens"),
        ("Completion length", MEAN_LENGTH, "tokens"),
        ("Truncated completions", CLIPPED_RATIO, "share of completions"),
        ("Repetition", "repeated", "share of repeated 4-grams"),
        ("Groups with zero reward variance", ZERO_STD, "share of prompts"),
        ("Explained variance", "explained_variance", "of returns by values"),
        ("Log-probability gap of engine and trainer", "engine_gap", "nats per token"),
        ("Loss", "loss", ""),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Learning rate", "learning_rate", ""),
    )
    plots += [
        (heading, {heading.lower(): subsample(get_points(name))}, y) for heading, name, y in one if get_points(name)
    ]
    seconds = {
        "sampling": get_points("sampling_seconds"),
        "scoring": get_points("scoring_seconds"),
        "whole step": get_points("seconds"),
    }
    return [
        *plots,
        ("Seconds", {name: subsample(points) for name, points in seconds.items() if points}, "per rollout, per step"),
    ]


def make_curves(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return (heading, series over steps, unit) of the plots."""
    smoothing_window = max(2, min(50, len(steps) // 10))

    def get_points(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(row["step"] + 1, row[name] * factor) for row in steps if name in row]

    loss = {
        "loss": subsample(get_points("loss")),
        f"mean of {smoothing_window}": subsample(smooth(get_points("loss"), smoothing_window)),
        **({"held-out": [(row["step"] + 1, row["eval_loss"]) for row in evaluations]} if evaluations else {}),
    }
    plots: list[Curve] = [
        ("Loss", loss, "per example"),
        (
            "Rewards",
            {
                side: subsample(smooth(get_points(f"rewards/{side}"), smoothing_window))
                for side in ("chosen", "rejected")
                if get_points(f"rewards/{side}")
            },
            f"mean of {smoothing_window} steps",
        ),
    ]
    for heading, y, train_key, eval_key in MARGIN_CURVES:
        series = {
            "training": subsample(smooth(get_points(train_key), smoothing_window)),
            "held-out": [(row["step"] + 1, row[eval_key]) for row in evaluations if eval_key in row],
        }
        if get_points(train_key) or evaluations:
            plots.append((heading, {key: points for key, points in series.items() if points}, y))
    for heading, name, y in (
        ("KL divergence from the reference", "kl", "nats per completion"),
        ("Entropy", "entropy", "nats per completion token"),
        ("Gradient norm", "grad_norm", "before clipping"),
        ("Learning rate", "learning_rate", ""),
    ):
        if get_points(name):
            plots.append((heading, {heading.lower(): subsample(get_points(name))}, y))
    most = list(accumulate((value for _, value in get_points("peak_memory", 1e-9)), max))
    plots.append(
        (
            "Memory",
            {"memory": subsample([(row["step"] + 1, value) for row, value in zip(steps, most, strict=True)])},
            "peak so far, GB",
        )
    )
    return [
        *plots,
        (
            "Speed",
            {
                "mean of 10": subsample(
                    smooth([(row["step"] + 1, row["tokens"] / max(row["seconds"], 1e-9)) for row in steps])
                )
            },
            "tokens per second",
        ),
    ]
