"""Stage `evaluate.contamination`: find evaluation samples that occur in the training data, and score without them.

A sample is contaminated when a training row shares an n-gram of its words: a 13-gram, as in GPT-3 (Brown et al. 2020,
appendix C), or the whole sample where it is shorter, but at least 8 words. N-grams that many samples share belong to
the task's template and do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from llmworks.core.artifact import Config, Dataset, Report
from llmworks.core.context import Context
from llmworks.data.store.eval_texts import read_eval_rows
from llmworks.evaluate.statistics.bootstrap import mean_interval
from llmworks.evaluate.statistics.read_evaluation import read_evaluation

WORD = re.compile(r"[0-9A-Za-z\x80-\U0010ffff]+")
COMMON_FRACTION = 0.02  # fraction of all samples; an n-gram in more of them is ignored


class ContaminationConfig(Config):
    """What counts as contaminated."""

    ngram: int = Field(
        13, ge=3, le=50, description="n-gram size: consecutive words that a training row must share with a sample"
    )
    min_words: int = Field(
        8,
        ge=3,
        description="samples shorter than ngram words are compared whole; those shorter than this are not compared",
    )


def contamination(
    config: ContaminationConfig, evaluation: Report, training_data: list[Dataset], ctx: Context
) -> Report:
    """Score contaminated and clean samples separately.

    Metrics: contaminated, clean, too_short (not compared), and score_ of each.
    Errors: DataError for a report that is not an evaluation, or training sets that cannot be read as text.
    """
    data = read_evaluation(evaluation, "task", "model", of_samples=("question", "score"))
    samples = {s["id"]: s for s in data["samples"]}
    samples_by_ngram, short = _index_ngrams(
        config, {i: f"{s['question']} {s.get('reference', '')}" for i, s in samples.items()}
    )
    sizes = sorted({len(run) for run in samples_by_ngram})
    touched: dict[str, str] = {}
    rows = 0
    for dataset in training_data:
        for id, text in read_eval_rows(dataset):
            rows += 1
            for run in _generate_ngrams(WORD.findall(text.lower()), sizes):
                for sample in samples_by_ngram.get(run, ()):
                    touched.setdefault(sample, f"{dataset.name}: {id}: {' '.join(run)}")
    clean = [i for i in samples if i not in touched and i not in short]
    sides = {"clean": clean, "contaminated": list(touched), "too_short": short}
    metrics: dict[str, object] = {"samples": len(samples), "training_rows": rows}
    metrics |= {name: len(ids) for name, ids in sides.items()}
    table = []
    for name, ids in (("all", list(samples)), *sides.items()):
        if ids:
            found = mean_interval(
                [samples[i]["score"] for i in ids], groups=[str(samples[i].get("group", "")) for i in ids]
            )
            table.append((name, len(ids), f"{found.value:.4g}", f"{found.low:.4g} to {found.high:.4g}"))
            if name != "all":
                metrics[f"score_{name}"] = found.value
    page = ctx.report
    page.title = f"{data['task']} on {data['model']}: contamination"
    page.subtitle = (
        f"{len(touched)} of {len(samples)} samples share {config.ngram} consecutive words with {rows:,} rows of"
        f" {', '.join(d.name for d in training_data)}; {len(short)} are too short to compare."
    )
    page.add_table("Mean score", ("samples", "count", "mean", "95% interval"), table)
    page.add_samples(
        "Contaminated samples",
        [
            {"": samples[i]["question"][:120], "question": samples[i]["question"], "shares": why}
            for i, why in list(touched.items())[:60]
        ],
    )
    page.data = {
        "contaminated": touched,
        "too_short": short,
        "metrics": metrics,
        "task": data["task"],
        "model": data["model"],
        "evaluation": evaluation.manifest.digest if evaluation.manifest else "",
    }
    return Report(
        ctx.out, metrics=dict(metrics), about={"model": evaluation.about.get("model", ""), "task": data["task"]}
    )


def _index_ngrams(
    config: ContaminationConfig, sample_texts: dict[str, str]
) -> tuple[dict[tuple[str, ...], list[str]], list[str]]:
    """Return (n-gram -> samples that contain it, samples that are too short to compare)."""
    samples_by_ngram: dict[tuple[str, ...], list[str]] = {}
    short: list[str] = []
    count: Counter[tuple[str, ...]] = Counter()
    for id, text in sample_texts.items():
        words = WORD.findall(text.lower())
        if len(words) < config.min_words:
            short.append(id)
            continue
        here = set(_generate_ngrams(words, [min(config.ngram, len(words))]))
        count.update(here)
        for run in here:
            samples_by_ngram.setdefault(run, []).append(id)
    most = max(2, COMMON_FRACTION * len(sample_texts))
    return {run: ids for run, ids in samples_by_ngram.items() if count[run] <= most}, short


def _generate_ngrams(words: list[str], sizes: list[int]) -> Iterator[tuple[str, ...]]:
    for size in sizes:
        for start in range(len(words) - size + 1):
            yield tuple(words[start : start + size])
