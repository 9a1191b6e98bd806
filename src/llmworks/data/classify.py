"""Stage `data.classify`: train a quality classifier on good and bad documents, score a corpus, keep the better part.

Logistic regression over hashed word unigrams and bigrams, like the quality filters of GPT-3 (Brown et al. 2020,
appendix A) and DCLM. Its quality is measured on held-out examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, iterate_documents, read_documents
from llmworks.core.errors import DataError, MissingDependency
from llmworks.core.types import Json
from llmworks.data.card import finish_dataset
from llmworks.data.store.parts import PartResults, Span, plan_spans, process_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmworks.core.report import ReportBuilder

MODEL, SCORES = "model.npz", "scores.npy"
EXCERPT_CHARACTERS = 2000  # characters; all examples are cut to this size, so that length is not a feature
MAX_SAMPLES = 5
MIN_EXAMPLES = 10  # examples of each class


class ClassifyConfig(Config):
    """Classifier training and score threshold. Without `threshold` and `quantile` all documents are kept and scored."""

    threshold: float | None = Field(None, ge=0, le=1, description="keep documents with at least this score")
    quantile: float | None = Field(
        None, gt=0, lt=1, description="drop this fraction of the documents, those with the lowest scores"
    )
    max_examples: int = Field(20_000, ge=20, description="maximum number of examples per class, held-out ones included")
    test_size: float = Field(0.2, gt=0, lt=1, description="fraction of the examples held out for evaluation")
    C: float = Field(10.0, gt=0, description="scikit-learn's C: inverse of the L2 regularization strength")
    score_field: str = Field("quality", description="metadata field that receives the score")
    seed: int = Field(0, description="seed for sampling and splitting the examples")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError("threshold and quantile are mutually exclusive: give only one")
        return self


def classify(config: ClassifyConfig, good: list[Dataset], bad: list[Dataset], data: Dataset, ctx: Context) -> Dataset:
    """Score every document of `data` with the classifier; those below the threshold go to `dropped/`.

    Errors: DataError with fewer than 10 examples of a class; MissingDependency without the extra `corpus`.
    """
    import numpy as np

    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "data.classify needs scikit-learn; install it with: pip install 'llmworks[corpus]'"
        ) from None
    report = train_classifier(config, good, bad, ctx)
    parts = plan_spans(data)
    scored = process_parts(ctx, "score", partial(_score_part, ctx.scratch / MODEL), parts)
    scores = np.concatenate([np.load(folder / SCORES) for folder in scored.folders])
    bound = (
        config.threshold
        if config.threshold is not None
        else float(np.quantile(scores, config.quantile))
        if config.quantile
        else 0.0
    )
    done = process_parts(
        ctx, "write", partial(_write_part, config.score_field, bound), list(zip(parts, scored.folders, strict=True))
    )
    if not done.sum_values("kept"):
        raise DataError(f"{data.name}: no document scores {bound:.3g} or more; the highest score is {scores.max():.3g}")
    done.gather(ctx.out)
    _report(ctx, data, scores, bound, done)
    metrics = {
        "documents": done.sum_values("kept"),
        "dropped": done.sum_values("dropped"),
        "threshold": round(bound, 6),
        **report,
    }
    return finish_dataset(
        ctx,
        "data.classify",
        [data],
        dropped={"low quality": done.sum_values("dropped")} if done.sum_values("dropped") else {},
        metrics=metrics,
    )


def train_classifier(config: ClassifyConfig, good: Sequence[Dataset], bad: Sequence[Dataset], ctx: Context) -> Json:
    """Train the classifier, evaluate it on held-out examples and save it to scratch; returns the metrics."""
    import numpy as np
    import pyarrow as pa
    from sklearn.metrics import roc_auc_score

    from llmworks.data.text.features import fit_classifier, hash_features, predict_probabilities, top_terms

    texts = [sample_examples(kind, config) for kind in (good, bad)]
    for name, found in zip(("good", "bad"), texts, strict=True):
        if len(found) < MIN_EXAMPLES:
            raise DataError(
                f"{name}: {len(found)} examples are too few to train on; at least {MIN_EXAMPLES} are needed"
            )
    every = texts[0] + texts[1]
    labels = np.array([1] * len(texts[0]) + [0] * len(texts[1]))
    test = np.zeros(len(every), dtype=bool)
    random = np.random.default_rng(config.seed)
    for kind in (0, 1):  # stratified by class
        places = np.flatnonzero(labels == kind)
        test[random.permutation(places)[: max(2, round(len(places) * config.test_size))]] = True
    matrix = hash_features(pa.array(every))
    model = fit_classifier(matrix[~test], labels[~test], config.C, config.seed)
    scores = predict_probabilities(model, matrix[test])
    truth = labels[test]
    model.save(ctx.scratch / MODEL)
    predicted = scores >= 0.5
    hits = int((predicted & (truth == 1)).sum())
    precision, recall = hits / max(1, int(predicted.sum())), hits / int(truth.sum())
    figures = {
        "auc": round(float(roc_auc_score(truth, scores)), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }
    report = _report_metrics(truth, scores, ctx, precision, recall, figures, test)
    plus, minus = top_terms(model, every[:: max(1, len(every) // 4000)], 15)
    rows = [(a, x, b, y) for (a, x), (b, y) in zip(plus, minus, strict=False)]
    report.add_table("Most predictive features", ("of good", "weight", "of bad", "weight"), rows)
    report.data = figures
    return figures


def _report_metrics(
    truth: NDArray[Any],
    scores: NDArray[Any],
    ctx: Context,
    precision: float,
    recall: float,
    figures: dict[str, float],
    test: NDArray[Any],
) -> ReportBuilder:
    """Report the metrics, ROC curve and precision-recall curve of the held-out examples."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    false, true, _ = roc_curve(truth, scores)
    p, r, _ = precision_recall_curve(truth, scores)
    report = ctx.report
    report.add_table(
        "Metrics on held-out examples",
        ("metric", "value"),
        [
            ("good examples", int(truth.sum())),
            ("bad examples", int((truth == 0).sum())),
            ("precision at 0.5", precision),
            ("recall at 0.5", recall),
            ("area under the ROC curve", figures["auc"]),
        ],
        note=f"{int((~test).sum()):,} training examples, {int(test.sum()):,} held-out examples.",
    )
    report.add_curves(
        "ROC",
        {"classifier": _subsample_curve(false, true), "chance": [(0, 0), (1, 1)]},
        x="false positive rate",
        y="true positive rate",
    )
    report.add_curves("Precision and recall", {"classifier": _subsample_curve(r, p)}, x="recall", y="precision")
    return report


def sample_examples(datasets: Sequence[Dataset], config: ClassifyConfig) -> list[str]:
    """Sample excerpts by reservoir sampling (Vitter 1985): one per document, equally many from each dataset."""
    import random

    chosen: list[str] = []
    for number, dataset in enumerate(datasets):
        draw = random.Random(f"{config.seed}/{number}")
        room = max(1, config.max_examples // len(datasets))
        kept: list[str] = []
        for seen, document in enumerate(read_documents(dataset)):
            place = seen if seen < room else draw.randrange(seen + 1)
            if place < room:
                start = draw.randrange(max(1, len(document.text) - EXCERPT_CHARACTERS))
                piece = document.text[start : start + EXCERPT_CHARACTERS]
                if seen < room:
                    kept.append(piece)
                else:
                    kept[place] = piece
        chosen += kept
    return chosen


def _score_part(model: Path, part: Span, folder: Path) -> Json:
    import numpy as np

    from llmworks.data.text.features import LinearClassifier

    linear = LinearClassifier.load(model)
    np.save(folder / SCORES, np.concatenate([linear.predict_proba(table["text"]) for table in part.tables(("text",))]))
    return {}


def _write_part(field: str, bound: float, unit: tuple[Span, Path], folder: Path) -> Json:
    import numpy as np

    part, scored = unit
    scores = np.load(scored / SCORES).tolist()
    at = 0
    worst: list[Json] = []
    best: list[Json] = []
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        for table in part.tables():
            for document in iterate_documents(table):
                score = round(scores[at], 5)
                scored_document = replace(document, metadata={**document.metadata, field: score})
                if scores[at] >= bound:
                    writer.add(scored_document)
                else:
                    dropped.add(scored_document, "low quality")
                sample = {"score": score, "id": document.id, "text": document.text[:500]}
                worst = (
                    sorted([*worst, sample], key=lambda s: s["score"])[:MAX_SAMPLES]
                    if len(worst) < MAX_SAMPLES or score < worst[-1]["score"]
                    else worst
                )
                best = (
                    sorted([*best, sample], key=lambda s: -s["score"])[:MAX_SAMPLES]
                    if len(best) < MAX_SAMPLES or score > best[-1]["score"]
                    else best
                )
                at += 1
    return {"kept": writer.documents, "dropped": dropped.documents, "worst": worst, "best": best}


def _subsample_curve(x: Any, y: Any, points: int = 200) -> list[tuple[float, float]]:
    """Subsample a curve to about `points` points."""
    step = max(1, len(x) // points)
    return [(float(a), float(b)) for a, b in zip(x[::step], y[::step], strict=True)] + [(float(x[-1]), float(y[-1]))]


def _report(ctx: Context, data: Dataset, scores: Any, bound: float, done: PartResults) -> None:
    import numpy as np

    report = ctx.report
    report.title = f"Quality scores of {data.name}"
    report.subtitle = (
        f"{done.sum_values('kept'):,} of {len(scores):,} documents score at least {bound:.3g} and are kept; the"
        " median score"
        f" is {np.median(scores):.3f}."
    )
    report.data = {
        **report.data,
        "kept": done.sum_values("kept"),
        "dropped": done.sum_values("dropped"),
        "threshold": bound,
    }
    counts = np.histogram(scores, bins=40, range=(0, 1))[0].tolist()
    report.add_histograms("Scores", {"documents": {"counts": counts, "top": 1, "low": bound or None, "high": None}})
    for heading, key, order in (("Lowest scores", "worst", 1), ("Highest scores", "best", -1)):
        found = sorted((s for summary in done.summaries for s in summary[key]), key=lambda s: order * s["score"])[
            :MAX_SAMPLES
        ]
        report.add_samples(heading, [{"document": f"{s['score']:.3f} · {s['id']}", "text": s["text"]} for s in found])
