"""Stage `tune.tradeoff`: report a model's quantizations: size, speed and KL divergence, the Pareto front, and which
skills degrade.

Does not quantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder


class Skill(Config):
    """A task's score."""

    score: float = Field(description="score: the task's first metric")
    low: float = Field(description="lower end of its 95% interval")
    high: float = Field(description="upper end of its 95% interval")


class Variant(Config):
    """One quantization method's result and measurements."""

    name: str = Field(description="name of the quantization method")
    engine: str = Field("", description="engine that loads it: transformers, llama.cpp ...")
    digest: str = Field("", description="digest of the model")
    error: str = Field("", description="error, where quantization failed")
    bytes: int = Field(0, description="size of the weight files in bytes")
    bits: float = Field(0.0, description="bits per quantized weight, including scales")
    kl: float | None = Field(None, description="KL divergence from the original model, nats per token")
    top1_agreement: float | None = Field(
        None, description="top-1 agreement with the original: share of tokens with the same argmax"
    )
    perplexity: float | None = Field(None, description="perplexity on held-out sequences")
    peak_memory: float | None = Field(None, description="peak memory in bytes during inference")
    prefill_speed: float | None = Field(None, description="prefill tokens per second")
    decode_speed: float | None = Field(None, description="decode tokens per second")
    skills: dict[str, Skill] = Field({}, description="scores by task")
    completions: dict[str, str] = Field({}, description="completions by prompt")


class TradeoffConfig(Config):
    """Quantizations and their measurements."""

    model: str = Field(description="the model's name")
    original: Variant = Field(description="the original model")
    variants: list[Variant] = Field(description="its quantizations")
    budget: float | None = Field(None, description="maximum size of the files in bytes")


def tradeoff(
    config: TradeoffConfig, ctx: Context, models: list[Model] | None = None, reports: list[Report] | None = None
) -> Report:
    """Report sizes against KL divergence, the Pareto front, a recommendation, skills, speeds and completions.

    `models`, `reports`: what was measured, and by what.

    Errors: DataError when no quantization succeeded, or none is within the budget.
    """
    quantized = sorted((v for v in config.variants if v.kl is not None), key=lambda v: (v.bytes, v.kl))
    if not quantized:
        raise DataError(
            f"no quantization of {config.model} succeeded; first error:"
            f" {next((v.error for v in config.variants if v.error), 'none was tried')}"
        )
    best = pareto_front(quantized)
    chosen = recommend(best, config.budget)
    page, original = ctx.report, config.original
    page.title = f"{config.model}: quantization tradeoff"
    page.subtitle = (
        f"{chosen.name}: {chosen.bytes / 1e6:,.1f} MB of {original.bytes / 1e6:,.1f}, KL divergence {chosen.kl:.4f}"
        f" nats per token from the original, top-1 agreement {chosen.top1_agreement or 0:.1%}."
    )
    page.add_text("Recommendation", _describe_recommendation(best, chosen, config.budget))
    _draw_sizes(quantized, page, best)
    _describe_all(original, quantized, page, best)
    _describe_skills(original, page, quantized)
    _describe_answers(original, page, quantized)
    failed = [v for v in config.variants if v.error]
    if failed:
        page.add_table("Failed quantizations", ("method", "error"), [(v.name, v.error) for v in failed])
    metrics: dict[str, Any] = {
        "variants": len(quantized),
        "failed": len(failed),
        "pareto_optimal": len(best),
        "recommended_bytes": chosen.bytes,
        "recommended_kl": chosen.kl,
    }
    page.data = {
        "metrics": metrics,
        "recommended": chosen.model_dump(),
        "pareto_optimal": [v.name for v in best],
        "original": original.model_dump(),
        "variants": [v.model_dump() for v in config.variants],
    }
    return Report(ctx.out, metrics=metrics)


def _draw_sizes(variants: list[Variant], page: ReportBuilder, best: list[Variant]) -> None:
    """Add the scatter plot of size against KL divergence."""
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for v in variants:
        groups.setdefault(v.engine, []).append((v.name, v.bytes / 1e6, max(float(v.kl or 0.0), 1e-6)))
    page.add_scatter(
        "Size and KL divergence",
        groups,
        [(v.bytes / 1e6, max(float(v.kl or 0.0), 1e-6)) for v in best],
        x="weights (MB)",
        y="KL divergence (nats per token)",
        log=True,
        note="The line is the Pareto front.",
    )


def _describe_all(original: Variant, variants: list[Variant], page: ReportBuilder, best: list[Variant]) -> None:
    """Add the table of all quantizations."""
    rows = [
        (
            v.name,
            v.engine,
            round(v.bytes / 1e6, 1),
            round(v.bits, 2),
            _format_number(v.kl, 4),
            _format_share(v.top1_agreement),
            _format_number(v.perplexity, 3),
            _format_number(v.peak_memory and v.peak_memory / 1e6, 0),
            _format_number(v.prefill_speed, 0),
            _format_number(v.decode_speed, 1),
            "yes" if v in best else "",
        )
        for v in (original, *variants)
    ]
    page.add_table(
        "All quantizations",
        (
            "method",
            "engine",
            "MB",
            "bits per weight",
            "KL (nats per token)",
            "top-1 agreement",
            "perplexity",
            "peak memory MB",
            "prefill tokens/s",
            "decode tokens/s",
            "Pareto front",
        ),
        rows,
        "KL divergence, top-1 agreement and perplexity are on the same held-out sequences. Bits are per quantized"
        " weight; GGUF files also quantize the embedding. Speeds are from one run on this machine.",
    )


def _describe_skills(original: Variant, page: ReportBuilder, variants: list[Variant]) -> None:
    """Add the table of skills, and the losses that perplexity does not show."""
    tasks = list(original.skills)
    if tasks:
        page.add_table(
            "Skills",
            ("method", *tasks),
            [
                (v.name, *(_format_skill(v.skills.get(task), original.skills[task]) for task in tasks))
                for v in (original, *variants)
            ],
            "Scores ± half of their 95% intervals; scores outside the original's interval are marked.",
        )
        page.add_text("Losses not visible in perplexity", describe_hidden_losses(original, variants))


def _describe_answers(original: Variant, page: ReportBuilder, variants: list[Variant]) -> None:
    """Add completions side by side."""
    prompts = list(original.completions)
    page_answers = [
        {
            "prompt": prompt,
            "as it was": original.completions[prompt],
            **{v.name: v.completions.get(prompt, "") for v in variants if v.completions},
        }
        for prompt in prompts
    ]
    if prompts:
        page.add_samples("Sample completions", page_answers)


def pareto_front(variants: Sequence[Variant]) -> list[Variant]:
    """Return the Pareto front of size and KL divergence, by increasing size."""
    best: list[Variant] = []
    for v in variants:
        if not best or (v.kl or 0.0) < (best[-1].kl or 0.0):
            best.append(v)
    return best


def recommend(best: Sequence[Variant], budget: float | None) -> Variant:
    """Recommend the lowest KL divergence within a budget of bytes; without one, the smallest with at least 95% top-1
    agreement, else the lowest KL divergence.

    DataError when nothing is within the budget.
    """
    if budget is not None:
        within = [v for v in best if v.bytes <= budget]
        if not within:
            raise DataError(
                f"no quantization is within {budget / 1e6:,.1f} MB; the smallest is {best[0].name} with"
                f" {best[0].bytes / 1e6:,.1f} MB"
            )
        return within[-1]
    return next((v for v in best if (v.top1_agreement or 0.0) >= 0.95), best[-1])


def _describe_recommendation(best: Sequence[Variant], chosen: Variant, budget: float | None) -> str:
    why = (
        f"has the lowest KL divergence within {budget / 1e6:,.1f} MB"
        if budget is not None
        else (
            "is the smallest with at least 95% top-1 agreement"
            if (chosen.top1_agreement or 0.0) >= 0.95
            else (
                "has the lowest KL divergence; none reaches 95% top-1 agreement, so try more bits (gguf-q6_k,"
                " gguf-q8_0, absmax-8)"
            )
        )
    )
    steps = ", ".join(f"{v.name} ({v.bytes / 1e6:,.1f} MB, {v.kl:.4f})" for v in best)
    return (
        f"{chosen.name} {why}. Pareto front, each with the lowest KL divergence of its size or less (MB, nats per"
        f" token): {steps}."
    )


def describe_hidden_losses(original: Variant, variants: Sequence[Variant]) -> str:
    """Describe skills that fall significantly while perplexity rises by less than 3%, and, among methods whose
    perplexities are within 5% of each other, the two that differ most in a skill.
    """
    found = [
        f"{v.name} loses {task} ({original.skills[task].score:.3g} to {v.skills[task].score:.3g}) although its"
        f" perplexity rises by only {v.perplexity / original.perplexity - 1:.1%}"
        for v in variants
        if v.perplexity and original.perplexity and v.perplexity < 1.03 * original.perplexity
        for task in original.skills
        if task in v.skills and v.skills[task].high < original.skills[task].low
    ]
    first = (
        "; ".join(found) + "."
        if found
        else (
            "No method with a perplexity increase below 3% has a significantly lower skill; with these sample sizes"
            " none was found."
        )
    )
    return " ".join([first, *(line for task in original.skills if (line := _describe_disagreement(task, variants)))])


def _describe_disagreement(task: str, variants: Sequence[Variant]) -> str:
    """Describe the two methods of similar perplexity that differ most in a skill; empty where all intervals overlap."""
    measured = [(v, v.perplexity, v.skills[task]) for v in variants if v.perplexity and task in v.skills]
    pairs = [
        (high.score - low.score, a, b)
        for a, one, high in measured
        for b, other, low in measured
        if high.low > low.high and 1 / 1.05 < one / other < 1.05
    ]
    if not pairs:
        return ""
    _, a, b = max(pairs, key=lambda pair: pair[0])
    return (
        f"{a.name} and {b.name} have similar perplexities ({a.perplexity:.2f} and {b.perplexity:.2f}), but not on"
        f" {task}: {a.skills[task].score:.3g} and {b.skills[task].score:.3g}."
    )


def _format_skill(skill: Skill | None, before: Skill) -> str:
    if skill is None:
        return "–"
    mark = " ↓" if skill.high < before.low else " ↑" if skill.low > before.high else ""
    return f"{skill.score:.3f} ±{(skill.high - skill.low) / 2:.3f}{mark}"


def _format_number(value: float | None, digits: int) -> Any:
    return "–" if value is None else round(value, digits) if digits else round(value)


def _format_share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
