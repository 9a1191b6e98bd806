"""Stage `tune.tradeoff`: the page of a model's quantizations: what each takes and what it costs, which are worth
having, which skill falls.

Knows no method.
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
    """One task's score."""

    score: float = Field(description="the task's first metric")
    low: float = Field(description="end of its 95% interval")
    high: float = Field(description="end of its 95% interval")


class Variant(Config):
    """One way to have the model, and what came of it."""

    name: str = Field(description="the way")
    engine: str = Field("", description="what loads it: transformers, llama.cpp ...")
    digest: str = Field("", description="of the model")
    error: str = Field("", description="why there is none")
    bytes: int = Field(0, description="of the weights' files")
    bits: float = Field(0.0, description="bits of a weight of what was quantized, scales included")
    kl: float | None = Field(None, description="divergence from the model as it was, nats a token")
    top1_agreement: float | None = Field(None, description="share of tokens of the same best guess")
    perplexity: float | None = Field(None, description="on the texts apart")
    peak_memory: float | None = Field(None, description="bytes at most while it runs")
    prefill_speed: float | None = Field(None, description="tokens a second")
    decode_speed: float | None = Field(None, description="tokens a second")
    skills: dict[str, Skill] = Field({}, description="scores by task")
    completions: dict[str, str] = Field({}, description="what it says, by prompt")


class TradeoffConfig(Config):
    """What was made and measured."""

    model: str = Field(description="the model's name")
    original: Variant = Field(description="the model as it was")
    variants: list[Variant] = Field(description="its quantizations")
    budget: float | None = Field(None, description="bytes that the files may have")


def tradeoff(
    config: TradeoffConfig, ctx: Context, models: list[Model] | None = None, reports: list[Report] | None = None
) -> Report:
    """Sizes against divergence, the ways that nothing smaller beats, a recommendation, skills, speeds, answers side by
    side.

    `models`, `reports`: what it was measured on and by.

    Errors: DataError when nothing was quantized, or nothing is within the budget.
    """
    made = sorted((v for v in config.variants if v.kl is not None), key=lambda v: (v.bytes, v.kl))
    if not made:
        raise DataError(
            f"no quantization of {config.model} came to a result; the first:"
            f" {next((v.error for v in config.variants if v.error), 'none was tried')}"
        )
    best = worth_having(made)
    chosen = recommended(best, config.budget)
    page, original = ctx.report, config.original
    page.title = f"{config.model}: what it costs to be smaller"
    page.lead = (
        f"{chosen.name}: {chosen.bytes / 1e6:,.1f} MB of {original.bytes / 1e6:,.1f}, {chosen.kl:.4f} nats a token away"
        f" from the model as it was, its best guess the same for {chosen.top1_agreement or 0:.1%} of tokens."
    )
    page.text("Which to take", _advice(best, chosen, config.budget))
    _draw_sizes(made, page, best)
    _describe_all(original, made, page, best)
    _describe_skills(original, page, made)
    _describe_answers(original, page, made)
    failed = [v for v in config.variants if v.error]
    if failed:
        page.table("What did not come to a result", ("way", "why"), [(v.name, v.error) for v in failed])
    metrics: dict[str, Any] = {
        "variants": len(made),
        "failed": len(failed),
        "worth_having": len(best),
        "recommended_bytes": chosen.bytes,
        "recommended_kl": chosen.kl,
    }
    page.data = {
        "metrics": metrics,
        "recommended": chosen.model_dump(),
        "worth_having": [v.name for v in best],
        "original": original.model_dump(),
        "variants": [v.model_dump() for v in config.variants],
    }
    return Report(ctx.out, metrics=metrics)


def _draw_sizes(made: list[Variant], page: ReportBuilder, best: list[Variant]) -> None:
    """Sizes against damage."""
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for v in made:
        groups.setdefault(v.engine, []).append((v.name, v.bytes / 1e6, max(float(v.kl or 0.0), 1e-6)))
    page.scatter(
        "Size and damage",
        groups,
        [(v.bytes / 1e6, max(float(v.kl or 0.0), 1e-6)) for v in best],
        x="megabytes of weights",
        y="nats a token away",
        log=True,
        note="The line goes through those that nothing smaller beats.",
    )


def _describe_all(original: Variant, made: list[Variant], page: ReportBuilder, best: list[Variant]) -> None:
    """The table of all quantizations."""
    rows = [
        (
            v.name,
            v.engine,
            round(v.bytes / 1e6, 1),
            round(v.bits, 2),
            _figure(v.kl, 4),
            _share(v.top1_agreement),
            _figure(v.perplexity, 3),
            _figure(v.peak_memory and v.peak_memory / 1e6, 0),
            _figure(v.prefill_speed, 0),
            _figure(v.decode_speed, 1),
            "yes" if v in best else "",
        )
        for v in (original, *made)
    ]
    page.table(
        "All",
        (
            "way",
            "loads in",
            "MB",
            "bits a weight",
            "nats a token",
            "same best guess",
            "perplexity",
            "memory MB",
            "reads tokens/s",
            "writes tokens/s",
            "worth having",
        ),
        rows,
        "Divergence, agreement and perplexity are on the same texts apart. Bits are of what was quantized; GGUF files"
        " quantize the embedding, too. Speeds are of one run on this machine.",
    )


def _describe_skills(original: Variant, page: ReportBuilder, made: list[Variant]) -> None:
    """The table of skills, and what perplexity hides of them."""
    tasks = list(original.skills)
    if tasks:
        page.table(
            "Skills",
            ("way", *tasks),
            [
                (v.name, *(_skill(v.skills.get(task), original.skills[task]) for task in tasks))
                for v in (original, *made)
            ],
            "Scores with the half of their 95% intervals; what is beyond the original's interval is marked.",
        )
        page.text("What the perplexity hides", hidden(original, made))


def _describe_answers(original: Variant, page: ReportBuilder, made: list[Variant]) -> None:
    """Answers side by side."""
    prompts = list(original.completions)
    page_answers = [
        {
            "prompt": prompt,
            "as it was": original.completions[prompt],
            **{v.name: v.completions.get(prompt, "") for v in made if v.completions},
        }
        for prompt in prompts
    ]
    if prompts:
        page.samples("What they say", page_answers)


def worth_having(made: Sequence[Variant]) -> list[Variant]:
    """Those, of growing size, that nothing of their size or less is as near to the model as (the Pareto front)."""
    best: list[Variant] = []
    for v in made:
        if not best or (v.kl or 0.0) < (best[-1].kl or 0.0):
            best.append(v)
    return best


def recommended(best: Sequence[Variant], budget: float | None) -> Variant:
    """The nearest within a budget of bytes; without one, the smallest whose best guess is the same for 95 % of tokens,
    else the nearest of all.

    DataError when nothing is small enough.
    """
    if budget is not None:
        within = [v for v in best if v.bytes <= budget]
        if not within:
            raise DataError(
                f"nothing is within {budget / 1e6:,.1f} MB; the smallest is {best[0].name} of"
                f" {best[0].bytes / 1e6:,.1f} MB"
            )
        return within[-1]
    return next((v for v in best if (v.top1_agreement or 0.0) >= 0.95), best[-1])


def _advice(best: Sequence[Variant], chosen: Variant, budget: float | None) -> str:
    why = (
        f"is the nearest to the model within {budget / 1e6:,.1f} MB"
        if budget is not None
        else (
            "is the smallest whose best guess is the same for 95 % of tokens"
            if (chosen.top1_agreement or 0.0) >= 0.95
            else (
                "is the nearest to the model of all that were tried; none has the same best guess for 95 % of tokens,"
                " so try more bits (gguf-q6_k, gguf-q8_0, absmax-8)"
            )
        )
    )
    steps = ", ".join(f"{v.name} ({v.bytes / 1e6:,.1f} MB, {v.kl:.4f})" for v in best)
    return (
        f"{chosen.name} {why}. Worth having at all, each the nearest of its size or less (megabytes, nats a token):"
        f" {steps}."
    )


def hidden(original: Variant, made: Sequence[Variant]) -> str:
    """Which skills fall beyond their interval while the perplexity rises by less than 3 %; and of ways whose
    perplexities are within 5 % of one another, the two that are farthest apart in a skill, beyond their intervals.
    """
    found = [
        f"{v.name} loses {task} ({original.skills[task].score:.3g} to {v.skills[task].score:.3g}) though its perplexity"
        f" rises by {v.perplexity / original.perplexity - 1:.1%} only"
        for v in made
        if v.perplexity and original.perplexity and v.perplexity < 1.03 * original.perplexity
        for task in original.skills
        if task in v.skills and v.skills[task].high < original.skills[task].low
    ]
    first = (
        "; ".join(found) + "."
        if found
        else (
            "No skill fell beyond its interval in a way whose perplexity rises by less than 3 %: on so many samples"
            " none was found."
        )
    )
    return " ".join([first, *(line for task in original.skills if (line := _apart(task, made)))])


def _apart(task: str, made: Sequence[Variant]) -> str:
    """The two ways of like perplexities that are farthest apart in a skill; nothing where all intervals overlap."""
    told = [(v, v.perplexity, v.skills[task]) for v in made if v.perplexity and task in v.skills]
    pairs = [
        (high.score - low.score, a, b)
        for a, one, high in told
        for b, other, low in told
        if high.low > low.high and 1 / 1.05 < one / other < 1.05
    ]
    if not pairs:
        return ""
    _, a, b = max(pairs, key=lambda pair: pair[0])
    return (
        f"{a.name} and {b.name} are alike by perplexity ({a.perplexity:.2f} and {b.perplexity:.2f}), and not in {task}:"
        f" {a.skills[task].score:.3g} and {b.skills[task].score:.3g}."
    )


def _skill(found: Skill | None, before: Skill) -> str:
    if found is None:
        return "–"
    mark = " ↓" if found.high < before.low else " ↑" if found.low > before.high else ""
    return f"{found.score:.3f} ±{(found.high - found.low) / 2:.3f}{mark}"


def _figure(value: float | None, digits: int) -> Any:
    return "–" if value is None else round(value, digits) if digits else round(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
