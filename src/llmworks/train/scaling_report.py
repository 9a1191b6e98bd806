"""The page of a scaling law: coefficients, runs, curves of equal work, prediction and result."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmworks.core.context import Context
from llmworks.train.scaling_plan import Plan, ScalingConfig

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.train.scaling_law import Interval, Law, Run


def tell(
    ctx: Context,
    config: ScalingConfig,
    plans: list[Plan],
    runs: list[Run],
    left_out: list[tuple[str, str]],
    law: Law,
    valleys: list[Any],
    target: Plan,
    expected: Interval,
    reached: Run,
) -> None:
    """Fill the report."""
    report = ctx.report
    report.title = f"Scaling law of {len(runs)} runs"
    off, inside = expected.value / reached.loss - 1, expected.low <= reached.loss <= expected.high
    report.lead = (
        f"L(N, D) = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}. The run of"
        f" {target.work:.2g} operations, {target.work / max(config.flops):.1f} times the largest of the grid, was"
        f" expected at {expected.value:.4f} nats a token ({expected.low:.4f} to {expected.high:.4f}) and reached"
        f" {reached.loss:.4f}: {abs(off):.2%} {'below' if off > 0 else 'above'} what was expected,"
        f" {'within' if inside else 'outside of'} the interval."
    )
    ctx.progress.say(report.lead)
    best, most = law.best(target.work, target.work / (target.parameters * target.tokens))
    report.text(
        "What is best",
        f"For {target.work:.2g} operations the law has its least loss at {best:,.0f} parameters and {most:,.0f} tokens,"
        f" {most / best:,.0f} for each parameter. The target has {target.parameters:,} parameters and {target.tokens:,}"
        " tokens.",
    )
    _describe_runs(report, plans, target, runs, reached, law, config)
    _describe_valleys(valleys, report, runs, law)
    ends = sorted((r.loss, law.at(r.parameters, r.tokens)) for r in [*runs, reached])
    report.curves(
        "Measured and of the law",
        {"runs": [(a, b) for a, b in ends], "equal": [(ends[0][0], ends[0][0]), (ends[-1][0], ends[-1][0])]},
        x="measured, nats per token",
        y="of the law",
    )
    if left_out:
        report.table("Left out", ("run", "why"), left_out)
    report.data = {
        "law": {name: asdict(law.of(name)) for name in ("floor", "a", "alpha", "b", "beta")},
        "runs": [asdict(r) for r in runs],
        "target": asdict(reached),
        "predicted": asdict(expected),
        "within": inside,
        "best": {"parameters": best, "tokens": most},
    }


def _describe_runs(
    report: ReportBuilder,
    plans: list[Plan],
    target: Plan,
    runs: list[Run],
    reached: Run,
    law: Law,
    config: ScalingConfig,
) -> None:
    """Tables of the law's coefficients and of all runs."""
    report.table(
        "The law",
        ("coefficient", "value", "low", "high"),
        [(name, i.value, i.low, i.high) for name in ("floor", "a", "alpha", "b", "beta") for i in (law.of(name),)],
        note=(
            "Intervals hold nine of ten of the values that are found when runs are drawn again with replacement."
            " Parameters are all of them, the embedding once."
        ),
    )
    rows = [
        (p.name, p.parameters, p.tokens, p.work, config.rate_of(p.size), r.loss, law.at(p.parameters, p.tokens))
        for p, r in zip([*plans, target], [*runs, reached], strict=True)
    ]
    report.table(
        "Runs",
        ("run", "parameters", "tokens", "operations", "learning rate", "loss", "of the law"),
        rows,
        note="The last is the target, which the law has not seen.",
    )


def _describe_valleys(valleys: list[Any], report: ReportBuilder, runs: list[Run], law: Law) -> None:
    """Curves of equal work with their parabolas, and the best size for each."""
    series = {
        f"{v.work:.2g} operations": sorted(
            (math.log10(r.parameters), r.loss) for r in runs if r.work / v.work - 1 < 0.1 and v.work / r.work - 1 < 0.1
        )
        for v in valleys
    }
    for v in valleys:
        xs = [x for x, _ in series[f"{v.work:.2g} operations"]]
        series[f"{v.work:.2g}, parabola"] = [
            (x, v.curve[0] * (t := x * math.log(10)) ** 2 + v.curve[1] * t + v.curve[2])
            for x in (xs[0] + i * (xs[-1] - xs[0]) / 40 for i in range(41))
        ]
    if series:
        report.curves("Equal work", series, x="log10 of parameters", y="nats per token")
    found = [v for v in valleys if v.parameters is not None]
    if valleys:
        report.table(
            "The best size for equal work",
            ("operations", "parameters, of the parabola", "low", "high", "of the law"),
            [
                (
                    v.work,
                    v.parameters.value if v.parameters else None,
                    v.parameters.low if v.parameters else None,
                    v.parameters.high if v.parameters else None,
                    law.best(v.work)[0],
                )
                for v in valleys
            ],
            note="None where the parabola has no least loss among the sizes that were run.",
        )
    if len(found) > 1:
        from llmworks.train.scaling_law import power

        factor, exponent = power([v.work for v in found], [v.parameters.value for v in found])
        report.text(
            "By the parabolas",
            f"The best number of parameters grows as {factor:.3g} times operations to the {exponent:.2f} (Hoffmann et"
            " al. found 0.49).",
        )
