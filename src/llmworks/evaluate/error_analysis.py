"""Stage `evaluate.error_analysis`: find where a model fails: by topic, length, group and kind of error.

Flags slices that fail more often than chance. Topics are clusters of all questions, so that each has a failure rate.
Does not load a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, MissingDependency
from llmworks.evaluate.statistics.bootstrap import holm
from llmworks.evaluate.statistics.read_evaluation import read_evaluation

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

EXAMPLES, MIN_SLICE_SIZE = 6, 5


class ErrorAnalysisConfig(Config):
    """How failures are grouped."""

    n_clusters: int = Field(8, ge=2, le=50, description="number of k-means clusters of questions (topics)")
    pass_threshold: float = Field(1.0, gt=0, le=1, description="a sample with a score below this has failed")
    seed: int = Field(0, description="clustering seed")


@dataclass(frozen=True)
class FailureSlice:
    """A slice of the samples: its ids, the number of failures and the p-value of that many by chance."""

    facet: str
    name: str
    ids: tuple[str, ...]
    failed: int
    p_value: float

    @property
    def rate(self) -> float:
        """Failure rate."""
        return self.failed / len(self.ids)


def error_analysis(config: ErrorAnalysisConfig, evaluation: Report, ctx: Context) -> Report:
    """Compute failure rates by topic, length, group and kind of error, and flag slices that fail more often than chance
    (Fisher's exact test, Holm correction).

    Errors: DataError for a report that is not an evaluation with right and wrong answers; MissingDependency without
    scikit-learn.
    """
    data = read_evaluation(evaluation, "task", "model", of_samples=("question", "score"))
    samples = {s["id"]: s for s in data["samples"]}
    if not data.get("percent", False) or data.get("better") == "lower":
        raise DataError(
            f"{evaluation.name}: has no right and wrong answers to analyze; give an evaluation with a 0-to-1 score"
        )
    failed = {i for i, s in samples.items() if s["score"] < config.pass_threshold}
    page = ctx.report
    page.title = f"Where {data['model']} fails on {data['task']}"
    page.subtitle = f"{len(failed)} of {len(samples)} samples failed ({len(failed) / len(samples):.1%})."
    kinds: dict[str, list[str]] = {}
    for i in sorted(failed):
        kinds.setdefault(classify_error(samples[i]), []).append(i)
    page.add_table(
        "Kinds of errors",
        ("kind", "samples", "share of failures"),
        [(k, len(v), f"{len(v) / len(failed):.0%}") for k, v in sorted(kinds.items(), key=lambda item: -len(item[1]))]
        or [("none", 0, "")],
    )
    facets = {
        "topic": assign_topics(samples, config),
        "length": assign_length_quartiles(samples),
        "group": {i: str(s["group"]) for i, s in samples.items() if s.get("group")},
    }
    parts = [p for facet, names in facets.items() for p in build_slices(facet, names, failed, len(samples))]
    adjusted = holm([p.p_value for p in parts])
    _describe_slices(parts, adjusted, page, kinds, failed, samples)
    page.data = {
        "failed": sorted(failed),
        "kinds": kinds,
        "parts": [
            {"facet": p.facet, "name": p.name, "samples": len(p.ids), "failed": p.failed, "p": p.p_value, "p_of_all": a}
            for p, a in zip(parts, adjusted, strict=True)
        ],
        "topics": facets["topic"],
    }
    worst = min(zip(adjusted, parts, strict=True), key=lambda item: (item[0], -item[1].rate), default=None)
    metrics = {
        "samples": len(samples),
        "failed": len(failed),
        "clusters": len(set(facets["topic"].values())),
        "significant_parts": sum(a < 0.05 for a in adjusted),
    }
    if worst is not None and worst[0] < 0.05:
        page.subtitle += f" Worst slice: {worst[1].facet} {worst[1].name!r}, {worst[1].failed} of {len(worst[1].ids)}."
    return Report(ctx.out, metrics=metrics, about={"model": evaluation.about.get("model", "")})


def _describe_slices(
    parts: list[FailureSlice],
    adjusted: list[float],
    page: ReportBuilder,
    kinds: dict[str, list[str]],
    failed: set[Any],
    samples: dict[Any, Any],
) -> None:
    """Add the table of slices with their rates, and samples of those that fail more often than chance."""
    rows = [
        (
            p.facet,
            p.name,
            len(p.ids),
            p.failed,
            f"{p.rate:.0%}",
            f"{p.p_value:.3g}",
            f"{a:.3g}",
            "above chance" if a < 0.05 else "",
        )
        for p, a in sorted(zip(parts, adjusted, strict=True), key=lambda item: (item[1], -item[0].rate))
    ]
    page.add_table(
        "Failure rates by slice",
        ("facet", "slice", "samples", "failed", "failure rate", "p", "adjusted p", ""),
        rows,
        "p: probability of at least this many failures in a slice if failures were spread evenly (Fisher's exact test,"
        f" one-sided). {len(parts)} slices are tested: the adjusted p corrects for that (Holm).",
    )
    for part in [p for p, a in zip(parts, adjusted, strict=True) if a < 0.05 and p.facet != "length"][:10]:
        page.add_samples(
            f"{part.facet}: {part.name}", [_format_sample(samples[i]) for i in part.ids if i in failed][:EXAMPLES]
        )
    for kind, ids in sorted(kinds.items(), key=lambda item: -len(item[1]))[:6]:
        page.add_samples(f"Error: {kind}", [_format_sample(samples[i]) for i in ids[:EXAMPLES]])


def classify_error(sample: Mapping[str, Any]) -> str:
    """Name the kind of error of a failed sample."""
    if sample.get("finish") == "refused":
        return "not answered"
    if "chosen" in sample:
        best = sorted(sample["logprobs"], reverse=True)
        return (
            "another option, by a narrow margin"
            if best[0] - best[1] < 0.1
            else f"chose {sample['chosen'][:20]!r} instead"
            if len(sample["chosen"]) <= 4
            else "another option"
        )
    if not str(sample.get("text", "")).strip():
        return "an empty answer"
    cut = " (cut off)" if sample.get("finish") == "length" else ""
    if any(answer == "[invalid]" for answers in sample.get("answers", {}).values() for answer in answers):
        return f"no answer found in the text{cut}"
    reason = str(sample.get("reason", "")).split(":")[0].split(",")[0].strip()
    return (reason or "another answer")[:60] + cut


def assign_topics(samples: Mapping[str, Mapping[str, Any]], config: ErrorAnalysisConfig) -> dict[str, str]:
    """Assign a topic to every sample: k-means on TF-IDF of the questions, named by distinctive words."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingDependency(
            "evaluate.error_analysis needs scikit-learn; install it with: pip install 'llmworks[corpus]'"
        ) from None
    import numpy as np

    ids = list(samples)
    try:
        vectorizer = TfidfVectorizer(
            stop_words="english", sublinear_tf=True, max_df=0.5, min_df=2, token_pattern=r"(?u)\b[^\W\d]{3,}\b"
        )
        vectors = vectorizer.fit_transform([samples[i]["question"] for i in ids])
    except ValueError:  # no word occurs in two questions
        return dict.fromkeys(ids, "all")
    count = min(config.n_clusters, max(2, len(ids) // MIN_SLICE_SIZE))
    places = KMeans(count, random_state=config.seed, n_init=4).fit_predict(vectors)
    words = np.array(vectorizer.get_feature_names_out())
    everywhere = np.asarray(vectors.mean(axis=0)).ravel()
    names: dict[int, str] = {}
    for place in range(count):
        here = vectors[places == place]
        if here.shape[0]:
            stands_out = np.asarray(here.mean(axis=0)).ravel() - everywhere
            names[place] = ", ".join(words[np.argsort(-stands_out)[:4]])
    return {i: names[int(place)] for i, place in zip(ids, places, strict=True)}


def assign_length_quartiles(samples: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Assign a length quartile to every sample."""
    size = {i: len(s["question"]) for i, s in samples.items()}
    order = sorted(size.values())
    bounds = [order[len(order) * q // 4] for q in (1, 2, 3)]
    names = [
        f"up to {bounds[0]} characters",
        f"{bounds[0]} to {bounds[1]}",
        f"{bounds[1]} to {bounds[2]}",
        f"above {bounds[2]} characters",
    ]
    return {i: names[sum(n > b for b in bounds)] for i, n in size.items()}


def build_slices(facet: str, names: Mapping[str, str], failed: set[str], total: int) -> list[FailureSlice]:
    """Return the slices of a facet that have enough samples, each with the p-value of its failures."""
    members: dict[str, list[str]] = {}
    for id, name in names.items():
        members.setdefault(name, []).append(id)
    out = []
    for name, ids in members.items():
        if len(ids) >= MIN_SLICE_SIZE and len(members) > 1:
            wrong = sum(i in failed for i in ids)
            out.append(
                FailureSlice(facet, name, tuple(ids), wrong, fisher_exact_p(wrong, len(ids), len(failed), total))
            )
    return out


def fisher_exact_p(marked_drawn: int, drawn: int, marked: int, total: int) -> float:
    """Compute the hypergeometric tail (Fisher's exact test, one-sided): the probability that, of `drawn` of `total`
    items of which `marked` are marked, at least `marked_drawn` are marked.
    """

    def logs(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    probabilities = [
        math.exp(logs(marked, k) + logs(total - marked, drawn - k) - logs(total, drawn))
        for k in range(max(marked_drawn, drawn - (total - marked)), min(drawn, marked) + 1)
    ]
    return min(1.0, math.fsum(probabilities))


def _format_sample(sample: Mapping[str, Any]) -> dict[str, str]:
    answers: Sequence[str] = [str(sample.get("text", ""))]
    return {
        "": str(sample["question"])[:140],
        "question": str(sample["question"]),
        "said": answers[0],
        "right": str(sample.get("reference", "")),
        "why": str(sample.get("reason", "")) or classify_error(sample),
    }
