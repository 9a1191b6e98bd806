"""The report of a scaling law: coefficients, runs, IsoFLOP curves, prediction and result."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from llmworks.core.context import Context
from llmworks.train.scaling_plan import ScalingConfig, ScalingRunPlan

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.train.scaling_law import IsoFlopCurve, ScalingInterval, ScalingLaw, ScalingRun


def write_report(
    ctx: Context,
    config: ScalingConfig,
    plans: list[ScalingRunPlan],
    runs: list[ScalingRun],
    skipped: list[tuple[str, str]],
    law: ScalingLaw,
    curves: list[IsoFlopCurve],
    target: ScalingRunPlan,
    predicted: ScalingInterval,
    measured: ScalingRun,
) -> None:
    """Fill the report."""
    report = ctx.report
    report.title = f"Scaling law of {len(runs)} runs"
    off, inside = predicted.value / measured.loss - 1, predicted.low <= measured.loss <= predicted.high
    report.subtitle = (
        f"L(N, D) = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}. Target run"
        f" of {target.flops:.2g} FLOPs, {target.flops / max(config.flops):.1f} times the largest of the grid:"
        f" predicted loss {predicted.value:.4f} nats per token ({predicted.low:.4f} to {predicted.high:.4f}),"
        f" measured {measured.loss:.4f}, {abs(off):.2%} {'below' if off > 0 else 'above'} the"
        f" prediction, {'within' if inside else 'outside'} the interval."
    )
    ctx.progress.log(report.subtitle)
    best, most = law.find_compute_optimal(target.flops, target.flops / (target.parameters * target.tokens))
    report.add_text(
        "Compute-optimal size",
        f"For {target.flops:.2g} FLOPs the scaling law is minimal at {best:,.0f} parameters and {most:,.0f}"
        f" tokens, {most / best:,.0f} tokens per parameter. The target has {target.parameters:,} parameters"
        f" and {target.tokens:,} tokens.",
    )
    _describe_runs(report, plans, target, runs, measured, law, config)
    _describe_isoflop(curves, report, runs, law)
    ends = sorted((r.loss, law.predict(r.parameters, r.tokens)) for r in [*runs, measured])
    report.add_curves(
        "Measured and predicted loss",
        {"runs": [(a, b) for a, b in ends], "equal": [(ends[0][0], ends[0][0]), (ends[-1][0], ends[-1][0])]},
        x="measured, nats per token",
        y="predicted",
    )
    if skipped:
        report.add_table("Skipped runs", ("run", "reason"), skipped)
    report.data = {
        "law": {name: asdict(law.get_coefficient(name)) for name in ("floor", "a", "alpha", "b", "beta")},
        "runs": [asdict(r) for r in runs],
        "target": asdict(measured),
        "predicted": asdict(predicted),
        "within": inside,
        "best": {"parameters": best, "tokens": most},
    }


def _describe_runs(
    report: ReportBuilder,
    plans: list[ScalingRunPlan],
    target: ScalingRunPlan,
    runs: list[ScalingRun],
    measured: ScalingRun,
    law: ScalingLaw,
    config: ScalingConfig,
) -> None:
    """Add the tables of coefficients and of all runs."""
    report.add_table(
        "Scaling law",
        ("coefficient", "value", "low", "high"),
        [
            (name, i.value, i.low, i.high)
            for name in ("floor", "a", "alpha", "b", "beta")
            for i in (law.get_coefficient(name),)
        ],
        note=("90% bootstrap confidence intervals over runs. Parameters include the embedding once."),
    )
    rows = [
        (
            p.name,
            p.parameters,
            p.tokens,
            p.flops,
            config.get_learning_rate(p.size),
            r.loss,
            law.predict(p.parameters, p.tokens),
        )
        for p, r in zip([*plans, target], [*runs, measured], strict=True)
    ]
    report.add_table(
        "Runs",
        ("run", "parameters", "tokens", "FLOPs", "learning rate", "loss", "predicted"),
        rows,
        note="The last one is the target, which was not used for the fit.",
    )


def _describe_isoflop(
    curves: list[IsoFlopCurve], report: ReportBuilder, runs: list[ScalingRun], law: ScalingLaw
) -> None:
    """Add the IsoFLOP curves with their parabolas, and the best size for each."""
    series = {
        f"{v.flops:.2g} FLOPs": sorted(
            (math.log10(r.parameters), r.loss)
            for r in runs
            if r.flops / v.flops - 1 < 0.1 and v.flops / r.flops - 1 < 0.1
        )
        for v in curves
    }
    for v in curves:
        xs = [x for x, _ in series[f"{v.flops:.2g} FLOPs"]]
        series[f"{v.flops:.2g}, parabola"] = [
            (x, v.coefficients[0] * (t := x * math.log(10)) ** 2 + v.coefficients[1] * t + v.coefficients[2])
            for x in (xs[0] + i * (xs[-1] - xs[0]) / 40 for i in range(41))
        ]
    if series:
        report.add_curves("IsoFLOP curves", series, x="log10 of parameters", y="nats per token")
    found = [(v, v.parameters) for v in curves if v.parameters is not None]
    if curves:
        report.add_table(
            "Compute-optimal size per budget",
            ("FLOPs", "parameters (parabola)", "low", "high", "predicted"),
            [
                (
                    v.flops,
                    v.parameters.value if v.parameters else None,
                    v.parameters.low if v.parameters else None,
                    v.parameters.high if v.parameters else None,
                    law.find_compute_optimal(v.flops)[0],
                )
                for v in curves
            ],
            note="None if the parabola has no minimum within the sizes that were run.",
        )
    if len(found) > 1:
        from llmworks.train.scaling_law import fit_power_law

        factor, exponent = fit_power_law([v.flops for v, _ in found], [least.value for _, least in found])
        report.add_text(
            "IsoFLOP fit",
            f"The compute-optimal number of parameters grows as {factor:.3g} * FLOPs^{exponent:.2f} (Hoffmann et"
            " al. found an exponent of 0.49).",
        )
