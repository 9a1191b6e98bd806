"""Stage `evaluate.compare`: is one evaluation better than another? A paired bootstrap over the same samples."""

from __future__ import annotations

from pydantic import Field

from llmworks.artifact import Config, Report
from llmworks.context import Context
from llmworks.errors import DataError
from llmworks.evaluate.bootstrap import RESAMPLES, paired_difference


class CompareConfig(Config):
    """How to resample."""

    resamples: int = Field(RESAMPLES, ge=100, description="number of bootstrap resamples")
    seed: int = Field(0, description="seed of the resampling")


def compare(config: CompareConfig, before: Report, after: Report, ctx: Context) -> Report:
    """The mean difference `after - before` with a 95% interval; metrics: difference, low, high, p_not_better, p_not_worse.

    Errors: DataError when the two reports are not of the same samples and task.
    """
    a, b = before.read(), after.read()
    if "samples" not in a or "samples" not in b:
        raise DataError(f"{before.name if 'samples' not in a else after.name}: is no evaluation, it has no samples")
    left, right = {s["id"]: s for s in a["samples"]}, {s["id"]: s for s in b["samples"]}
    if a["task"] != b["task"] or set(left) != set(right):
        raise DataError(
            f"{before.name} and {after.name} are not of the same task and samples ({a['task']}: {len(left)}, {b['task']}: {len(right)}), so they cannot be paired"
        )
    ids = sorted(left)
    other = next((i for i in ids if left[i]["question"] != right[i]["question"]), None)
    if other is not None:
        raise DataError(f"{before.name} and {after.name} ask different questions under the id {other!r}, so they cannot be paired")
    paired = paired_difference(
        [left[i]["score"] for i in ids], [right[i]["score"] for i in ids], seed=config.seed, resamples=config.resamples
    )
    d = paired.difference
    gained = sum(right[i]["score"] > left[i]["score"] for i in ids)
    lost = sum(right[i]["score"] < left[i]["score"] for i in ids)
    metrics = {
        "difference": d.value,
        "low": d.low,
        "high": d.high,
        "p_not_better": paired.p_not_better,
        "p_not_worse": paired.p_not_worse,
        "gained": gained,
        "lost": lost,
        "samples": len(ids),
    }
    verdict = "better" if d.low > 0 else "worse" if d.high < 0 else "not told apart"
    ctx.report.title = f"{after.name} against {before.name}"
    ctx.report.lead = f"{after.name} is {verdict}: {d.value:+.1%} (95% interval {d.low:+.1%} to {d.high:+.1%}) over {len(ids)} paired samples; {gained} gained, {lost} lost."
    ctx.report.data = {"before": before.name, "after": after.name, "verdict": verdict, "metrics": metrics}
    ctx.report.table("Paired bootstrap", ("what", "value"), list(metrics.items()))
    changed = [i for i in ids if left[i]["score"] != right[i]["score"]]
    ctx.report.samples(
        "Samples that changed",
        [
            {
                "": f"{'+' if right[i]['score'] > left[i]['score'] else '−'} {left[i]['question'][:110]}",
                before.name: left[i]["text"],
                after.name: right[i]["text"],
            }
            for i in changed[:40]
        ],
    )
    return Report(ctx.out, metrics=metrics, about={"verdict": verdict})
