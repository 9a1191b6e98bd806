"""The report of a scaling law: coefficients, runs, IsoFLOP curves, prediction and result."""

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
        f"L(N, D) = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}. Target run"
        f" of {target.work:.2g} FLOPs, {target.work / max(config.flops):.1f} times the largest of the grid:"
        f" predicted loss {expected.value:.4f} nats per token ({expected.low:.4f} to {expected.high:.4f}),"
        f" measured {reached.loss:.4f}, {abs(off):.2%} {'below' if off > 0 else 'above'} the"
        f" prediction, {'within' if inside else 'outside'} the interval."
    )
    ctx.progress.say(report.lead)
    best, most = law.best(target.work, target.work / (target.parameters * target.tokens))
    report.text(
        "Compute-optimal size",
        f"For {target.work:.2g} FLOPs the scaling law is minimal at {best:,.0f} parameters and {most:,.0f}"
        f" tokens, {most / best:,.0f} tokens per parameter. The target has {target.parameters:,} parameters"
        f" and {target.tokens:,} tokens.",
    )
    _describe_runs(report, plans, target, runs, reached, law, config)
    _describe_valleys(valleys, report, runs, law)
    ends = sorted((r.loss, law.at(r.parameters, r.tokens)) for r in [*runs, reached])
    report.curves(
        "Measured and predicted loss",
        {"runs": [(a, b) for a, b in ends], "equal": [(ends[0][0], ends[0][0]), (ends[-1][0], ends[-1][0])]},
        x="measured, nats per token",
        y="predicted",
    )
    if left_out:
        report.table("Skipped runs", ("run", "reason"), left_out)
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
    """Add the tables of coefficients and of all runs."""
    report.table(
        "Scaling law",
        ("coefficient", "value", "low", "high"),
        [(name, i.value, i.low, i.high) for name in ("floor", "a", "alpha", "b", "beta") for i in (law.of(name),)],
        note=("90% bootstrap confidence intervals over runs. Parameters include the embedding once."),
    )
    rows = [
        (p.name, p.parameters, p.tokens, p.work, config.rate_of(p.size), r.loss, law.at(p.parameters, p.tokens))
        for p, r in zip([*plans, target], [*runs, reached], strict=True)
    ]
    report.table(
        "Runs",
        ("run", "parameters", "tokens", "FLOPs", "learning rate", "loss", "predicted"),
        rows,
        note="The last one is the target, which was not used for the fit.",
    )


def _describe_valleys(valleys: list[Any], report: ReportBuilder, runs: list[Run], law: Law) -> None:
    """Add the IsoFLOP curves with their parabolas, and the best size for each."""
    series = {
        f"{v.work:.2g} FLOPs": sorted(
            (math.log10(r.parameters), r.loss) for r in runs if r.work / v.work - 1 < 0.1 and v.work / r.work - 1 < 0.1
        )
        for v in valleys
    }
    for v in valleys:
        xs = [x for x, _ in series[f"{v.work:.2g} FLOPs"]]
        series[f"{v.work:.2g}, parabola"] = [
            (x, v.curve[0] * (t := x * math.log(10)) ** 2 + v.curve[1] * t + v.curve[2])
            for x in (xs[0] + i * (xs[-1] - xs[0]) / 40 for i in range(41))
        ]
    if series:
        report.curves("IsoFLOP curves", series, x="log10 of parameters", y="nats per token")
    found = [v for v in valleys if v.parameters is not None]
    if valleys:
        report.table(
            "Compute-optimal size per budget",
            ("FLOPs", "parameters (parabola)", "low", "high", "predicted"),
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
            note="None if the parabola has no minimum within the sizes that were run.",
        )
    if len(found) > 1:
        from llmworks.train.scaling_law import power

        factor, exponent = power([v.work for v in found], [v.parameters.value for v in found])
        report.text(
            "IsoFLOP fit",
            f"The compute-optimal number of parameters grows as {factor:.3g} * FLOPs^{exponent:.2f} (Hoffmann et"
            " al. found an exponent of 0.49).",
        )
