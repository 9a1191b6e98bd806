"""Metrics against the libraries that define them, worked examples, and closed forms."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
import sacrebleu

from llmworks.evaluate.protocol.filters import PatternTimeout, extract
from llmworks.evaluate.protocol.task import FilterStep, MetricSpec
from llmworks.evaluate.statistics.bootstrap import bootstrap_interval
from llmworks.evaluate.statistics.metrics import (
    ChoiceSample,
    GeneratedSample,
    LikelihoodSample,
    exact_match,
    f1,
    get_metric,
    pass_at_k,
)

WORDS = [
    "a",
    "cat",
    "the",
    "sat",
    "on",
    "mat",
    "dog",
    "runs",
    "fast",
    "over",
    "hill",
    "and",
    "under",
    "bridge",
    "Oslo",
    "42",
    "it's",
]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 14))) for _ in range(count)]


def total(kind: Any, name: str, samples: list[Any], **more: Any) -> float:
    metric = get_metric(kind, MetricSpec(name=name, **more))
    return bootstrap_interval([metric.sample_statistics(s) for s in samples], metric.aggregate, resamples=100).value


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_corpus_scores_are_those_of_sacrebleu(name: str) -> None:
    said, wanted = texts(30, 0), texts(30, 1)
    wanted[:10] = [f"{t} and so on" for t in said[:10]]
    theirs = {
        "bleu": lambda: sacrebleu.corpus_bleu(said, [wanted]),
        "chrf": lambda: sacrebleu.corpus_chrf(said, [wanted]),
        "chrf++": lambda: sacrebleu.corpus_chrf(said, [wanted], word_order=2),
        "ter": lambda: sacrebleu.corpus_ter(said, [wanted]),
    }[name]().score
    assert total(
        "generate", name, [GeneratedSample([s], [w]) for s, w in zip(said, wanted, strict=True)]
    ) == pytest.approx(theirs)


def test_bleu_of_few_matches_is_smoothed_by_whole_counts() -> None:
    """BLEU's smoothing depends on the counts themselves, not on their ratios."""
    samples = [GeneratedSample([s], [w]) for s, w in (("the cat", "a dog sat"), ("on the mat", "the mat here"))]
    assert total("generate", "bleu", samples) == pytest.approx(
        sacrebleu.corpus_bleu(["the cat", "on the mat"], [["a dog sat", "the mat here"]]).score
    )


def test_rouge_is_that_of_its_reference_implementation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for said, wanted in zip(texts(40, 2), texts(40, 3), strict=True):
        found = scorer.score(wanted, said)
        for name in ("rouge1", "rouge2", "rougeL"):
            assert total("generate", name, [GeneratedSample([said], [wanted])]) == pytest.approx(found[name].fmeasure)


def test_pass_at_k_counts_all_draws() -> None:
    """The estimator of Chen et al. 2021 is the share of all draws of k tries that hold a right one."""
    for n, right in itertools.product(range(1, 8), range(8)):
        if right > n:
            continue
        tries = [i < right for i in range(n)]
        for k in range(1, n + 1):
            draws = list(itertools.combinations(tries, k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_options_by_log_probability() -> None:
    """Worked by hand: -4/2 against -3/1 and -9/9 nats a character; bytes differ from characters."""
    sample = ChoiceSample([-4.0, -3.0, -9.0], ["ab", "c", "ääääääääd"[:9]], [2])
    assert [total("choice", m, [sample]) for m in ("acc", "acc_norm", "acc_bytes")] == [0.0, 1.0, 1.0]
    assert total("choice", "acc", [ChoiceSample([-1.0, -1.0], ["x", "y"], [0])]) == 1.0  # of equals the first
    odds = np.exp([-4.0, -3.0, -9.0])
    odds /= odds.sum()
    assert total("choice", "brier_score", [sample]) == pytest.approx(odds[0] ** 2 + odds[1] ** 2 + (odds[2] - 1) ** 2)


def test_perplexities_are_of_all_texts_together() -> None:
    samples = [LikelihoodSample(-20.0, 10, False, "one two ä"), LikelihoodSample(-5.0, 2, False, "x")]
    assert total("perplexity", "token_perplexity", samples) == pytest.approx(math.exp(25 / 12))
    assert total("perplexity", "bits_per_byte", samples) == pytest.approx(25 / math.log(2) / 11)
    assert total("perplexity", "word_perplexity", samples) == pytest.approx(math.exp(25 / 4))


def test_exact_match_ignores_what_it_is_told_to() -> None:
    measure = MetricSpec(name="exact_match", ignore_case=True, ignore_punctuation=True, ignore=[r"(?s).*#### ", ","])
    assert exact_match(measure, "So #### 1,234!", "1234") == 1.0
    assert exact_match(MetricSpec(name="exact_match"), "A", "a") == 0.0
    assert f1("The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert (f1("", ""), f1("x", "")) == (1.0, 0.0)


def test_answers_are_found_in_what_was_said() -> None:
    number = FilterStep(how="regex", pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", pick=-1)
    assert extract([number], "first 3, then $1,200 and 7") == "7"
    assert extract([number], "none") == "[invalid]"
    assert extract([FilterStep(how="strip"), FilterStep(how="lower")], "  Yes ") == "yes"
    assert extract([FilterStep(how="final_answer")], "I think.\nAnswer: 12") == "12"
    assert extract([FilterStep(how="first_line"), FilterStep(how="upper")], "\n a\nb") == "A"
    slow = FilterStep(how="regex", pattern=r"(a|aa)+$")
    with pytest.raises(PatternTimeout, match="timed out after 2 s"):  # it would take for ever
        extract([slow], "a" * 60 + "b")
