"""Metrics: each maps a sample to a few numbers, and the sums of those numbers over samples to its value.

That form covers means, ratios (perplexity) and corpus scores (BLEU), so that all can be bootstrapped. Does not call
engines or read files.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import regex as expressions

from llmworks.core.errors import UserError
from llmworks.core.text.words import split_words
from llmworks.evaluate.protocol.task import Kind, MetricSpec
from llmworks.score.degeneration import has_same_start
from llmworks.score.rouge import rouge_l, rouge_n

Numbers = tuple[float, ...]
SECONDS = 2.0  # timeout of one pattern on one text


@dataclass(frozen=True)
class ChoiceSample:
    """Scores of a question's options: log-probabilities in nats, the options' texts, the indices of the right ones."""

    logprobs: Sequence[float]
    choices: Sequence[str]
    gold: Sequence[int]


@dataclass(frozen=True)
class LikelihoodSample:
    """Log-probability of a text in nats, its tokens, whether greedy decoding produces it, and the text."""

    logprob: float
    tokens: int
    greedy: bool
    text: str


@dataclass(frozen=True)
class GeneratedSample:
    """Extracted answers generated for one question, the references, and each score function's score of every answer."""

    answers: Sequence[str]
    references: Sequence[str]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A metric: `sample_statistics` of the samples are summed; `aggregate` maps the sums [..., k] to the metric."""

    name: str
    sample_statistics: Callable[[Any], Numbers]
    aggregate: Callable[[Any], Any]
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True  # between 0 and 1, shown in percent
    corpus: bool = field(default=False)  # not a mean over samples


def mean_metric(name: str, of: Callable[[Any], float], **more: Any) -> Metric:
    """Build a metric that is the mean of a per-sample value."""
    return Metric(name, lambda sample: (float(of(sample)), 1.0), lambda sums: sums[..., 0] / sums[..., 1], **more)

    # multiple choice by log-probability


def _is_right(sample: ChoiceSample, lengths: Sequence[float]) -> float:
    scaled = [logprob / length for logprob, length in zip(sample.logprobs, lengths, strict=True)]
    return float(scaled.index(max(scaled)) in sample.gold)


def _brier(sample: ChoiceSample) -> float:
    top = max(sample.logprobs)
    weights = [math.exp(logprob - top) for logprob in sample.logprobs]
    return sum((weight / sum(weights) - (i in sample.gold) / len(sample.gold)) ** 2 for i, weight in enumerate(weights))


CHOICE_METRICS = {
    "acc": mean_metric("acc", lambda s: _is_right(s, [1.0] * len(s.choices))),
    "acc_norm": mean_metric("acc_norm", lambda s: _is_right(s, [max(1, len(c)) for c in s.choices])),
    "acc_bytes": mean_metric("acc_bytes", lambda s: _is_right(s, [max(1, len(c.encode())) for c in s.choices])),
    "brier_score": mean_metric("brier_score", _brier, better="lower", percent=False),
}


# loglikelihood


def _ratio_metric(name: str, below: Callable[[LikelihoodSample], float], value: Callable[[Any], Any]) -> Metric:
    return Metric(
        name,
        lambda s: (-s.logprob, float(below(s))),
        lambda sums: value(sums[..., 0] / sums[..., 1]),
        better="lower",
        percent=False,
        corpus=True,
    )


def _exp(nats: Any) -> Any:
    import numpy as np

    return np.exp(nats)


LIKELIHOOD_METRICS = {
    "acc": mean_metric("acc", lambda s: float(s.greedy)),
    "perplexity": _ratio_metric("perplexity", lambda s: 1.0, _exp),
}
PERPLEXITY_METRICS = {
    "bits_per_byte": _ratio_metric("bits_per_byte", lambda s: len(s.text.encode()), lambda nats: nats / math.log(2)),
    "byte_perplexity": _ratio_metric("byte_perplexity", lambda s: len(s.text.encode()), _exp),
    "word_perplexity": _ratio_metric("word_perplexity", lambda s: len(re.split(r"\s+", s.text)), _exp),
    "token_perplexity": _ratio_metric("token_perplexity", lambda s: s.tokens, _exp),
}


# generated text


def exact_match(measure: MetricSpec, prediction: str, reference: str) -> float:
    """Return 1 when both texts are equal after removing, in this order: ignored patterns, case, punctuation (as Hugging
    Face's `evaluate`).
    """
    return float(_normalize(measure, prediction) == _normalize(measure, reference))


def _normalize(measure: MetricSpec, text: str) -> str:
    for pattern in measure.ignore:
        try:
            text = expressions.sub(pattern, "", text, timeout=SECONDS)
        except TimeoutError:
            return ""
    text = text.lower() if measure.ignore_case else text
    return text.translate(str.maketrans("", "", string.punctuation)) if measure.ignore_punctuation else text


def f1(prediction: str, reference: str) -> float:
    """Compute token-level F1, without articles, case and punctuation (SQuAD, Rajpurkar et al. 2016)."""
    predicted_words, reference_words = (
        re.sub(r"\b(a|an|the)\b", " ", re.sub(f"[{re.escape(string.punctuation)}]", "", t.lower())).split()
        for t in (prediction, reference)
    )
    same = sum((Counter(predicted_words) & Counter(reference_words)).values())
    return (
        float(predicted_words == reference_words)
        if not predicted_words or not reference_words
        else 2 * same / (len(predicted_words) + len(reference_words))
    )


def pass_at_k(n: int, right: int, k: int) -> float:
    """Estimate pass@k without bias: the probability that one of k samples passes, from n samples of which `right` pass
    (Chen et al. 2021, arXiv:2107.03374, equation 1).
    """
    return 1.0 if n - right < k else 1.0 - math.prod(1.0 - k / i for i in range(n - right + 1, n + 1))


def _best_of_references(of: Callable[[str, str], float]) -> Callable[[GeneratedSample], float]:
    """Average over answers the best score over references."""
    return lambda s: (
        sum(max(of(answer, reference) for reference in s.references) for answer in s.answers) / len(s.answers)
    )


@cache
def _load_sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    return BLEU() if name == "bleu" else TER() if name == "ter" else CHRF(word_order=2 if name == "chrf++" else 0)


def _corpus_metric(name: str) -> Metric:
    """Build a corpus metric of sacrebleu (Post 2018) from its per-sample statistics. Range 0 to 100."""

    def numbers(sample: GeneratedSample) -> Numbers:
        (counts,) = _load_sacrebleu(name)._extract_corpus_statistics(
            [sample.answers[0]], [[reference] for reference in sample.references]
        )
        return tuple(float(count) for count in counts)

    def value(sums: Any) -> Any:
        import numpy as np

        return np.apply_along_axis(
            lambda row: _load_sacrebleu(name)._compute_score_from_stats(list(row)).score, -1, sums
        )

    return Metric(name, numbers, value, better="lower" if name == "ter" else "higher", percent=False, corpus=True)


def _rouge_metric(n: int) -> Callable[[str, str], float]:
    return lambda prediction, reference: (
        rouge_n(split_words(prediction), split_words(reference), n)
        if n
        else rouge_l(split_words(prediction), split_words(reference))
    )


GENERATION_METRICS: dict[str, Callable[[MetricSpec], Metric]] = {
    "exact_match": lambda m: mean_metric(
        "exact_match", _best_of_references(lambda prediction, reference: exact_match(m, prediction, reference))
    ),
    "contains": lambda m: mean_metric(
        "contains",
        _best_of_references(lambda prediction, reference: float(reference.strip().lower() in prediction.lower())),
    ),
    "f1": lambda m: mean_metric("f1", _best_of_references(f1)),
    "same_start": lambda m: mean_metric(
        "same_start", _best_of_references(lambda prediction, reference: float(has_same_start(prediction, reference)))
    ),
    "rouge1": lambda m: mean_metric("rouge1", _best_of_references(_rouge_metric(1))),
    "rouge2": lambda m: mean_metric("rouge2", _best_of_references(_rouge_metric(2))),
    "rougeL": lambda m: mean_metric("rougeL", _best_of_references(_rouge_metric(0))),
    "bleu": lambda m: _corpus_metric("bleu"),
    "chrf": lambda m: _corpus_metric("chrf"),
    "chrf++": lambda m: _corpus_metric("chrf++"),
    "ter": lambda m: _corpus_metric("ter"),
}
LOGLIKELIHOOD_METRICS: dict[Kind, Mapping[str, Metric]] = {
    "choice": CHOICE_METRICS,
    "likelihood": LIKELIHOOD_METRICS,
    "perplexity": PERPLEXITY_METRICS,
}


def check_metric(kind: Kind, measure: MetricSpec, task: str) -> None:
    """Raise UserError for a metric that a kind of task does not support."""
    from llmworks.score import SCORES

    known = sorted([*GENERATION_METRICS, *SCORES, "pass_at"] if kind == "generate" else LOGLIKELIHOOD_METRICS[kind])
    if measure.name not in known:
        raise UserError(f"{task}: a task of kind {kind} has no metric {measure.name!r}; known: {', '.join(known)}")
    if measure.name == "pass_at" and measure.of not in SCORES:
        raise UserError(
            f"{task}: pass_at needs `of`, the score function that decides which samples pass; known:"
            f" {', '.join(sorted(SCORES))}"
        )


def list_score_functions(measures: Sequence[MetricSpec]) -> list[str]:
    """List the score functions that these metrics use."""
    return list(
        dict.fromkeys(m.of if m.name == "pass_at" else m.name for m in measures if m.name not in GENERATION_METRICS)
    )


def get_metric(kind: Kind, measure: MetricSpec) -> Metric:
    """Return the metric that a task names; a score function becomes the mean of its scores."""
    if kind != "generate":
        return LOGLIKELIHOOD_METRICS[kind][measure.name]
    if measure.name in GENERATION_METRICS:
        return GENERATION_METRICS[measure.name](measure)
    if measure.name == "pass_at":
        return mean_metric(
            f"pass@{measure.k}",
            lambda s: pass_at_k(
                len(s.scores[measure.of]), sum(score == 1.0 for score in s.scores[measure.of]), measure.k
            ),
        )
    return mean_metric(measure.name, lambda s: sum(s.scores[measure.name]) / len(s.scores[measure.name]))
