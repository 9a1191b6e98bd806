"""Stage `model.embedding`: train word vectors (Word2Vec skip-gram or CBOW, FastText, GloVe), score them and plot a map.

Word2Vec and FastText use gensim, GloVe is `glove.py`. The result loads as any text embedder (a text is the mean of its
word vectors). The native format is saved too: `vectors.bin` of word2vec, or `fasttext.bin`, which embeds
out-of-vocabulary words by their character n-grams.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import regex
from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.documents import count_characters, read_documents
from llmworks.core.errors import DataError, MissingDependency, TrainingError, UserError
from llmworks.embed.word_similarity import (
    Analogies,
    VectorLookup,
    WordScore,
    read_word_test,
    score_analogies,
    score_similarity,
)

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

WORD = r"[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*|\p{N}+"  # also the pattern of the saved tokenizer
SENTENCE_LENGTH = 10_000  # words per sentence passed to gensim
NUM_NEIGHBORS, NUM_EXAMPLES, NUM_MAP_WORDS, NUM_CLUSTERS = 8, 24, 260, 12
UNKNOWN = "<unk>"
COLLAPSE_THRESHOLD = 0.8  # mean cosine of random word pairs above which a warning is given


class EmbeddingConfig(Config):
    """Word-vector training settings."""

    method: Literal["skip-gram", "cbow", "fasttext", "glove"] = Field(
        "skip-gram",
        description=(
            "skip-gram: predict the context from a word; cbow: predict a word from its context (Mikolov et al. 2013);"
            " fasttext: skip-gram over character n-grams (Bojanowski et al. 2017); glove (Pennington et al. 2014)"
        ),
    )
    vector_size: int = Field(100, gt=1, description="vector dimensions")
    window: int = Field(
        5, gt=0, description="context window: words to each side; word2vec samples a smaller one for each word"
    )
    min_count: int = Field(5, gt=0, description="minimum frequency of a word in the corpus")
    max_final_vocab: int = Field(100_000, gt=0, description="maximum vocabulary size; the most frequent words are kept")
    lowercase: bool = Field(True, description="lowercase the words")
    epochs: int = Field(0, ge=0, description="epochs; 0 = 5, for glove 15 (over co-occurring pairs)")
    learning_rate: float = Field(
        0.0, ge=0, description="initial learning rate; 0 = 0.025 for skip-gram and fasttext, 0.05 for cbow and glove"
    )
    negative: int = Field(
        5, gt=0, description="negative sampling: negative words per positive pair (all methods but glove)"
    )
    sample: float = Field(1e-4, ge=0, description="threshold for subsampling frequent words (all but glove); 0 = off")
    char_ngrams: tuple[int, int] = Field(
        (3, 6), description="minimum and maximum length of character n-grams (fasttext)"
    )
    workers: int = Field(
        1, gt=0, description="threads (all but glove); with more than one, vectors differ from run to run"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not 1 <= self.char_ngrams[0] <= self.char_ngrams[1] <= 20:
            raise ValueError(f"char_ngrams is {list(self.char_ngrams)}; needs 1 <= minimum <= maximum <= 20")
        return self


@dataclass(frozen=True)
class WordVectors:
    """Trained words, most frequent first, their vectors [words, dimensions] in fp32, and a lookup (None if unknown)."""

    words: list[str]
    table: Any
    lookup: VectorLookup


def embedding(config: EmbeddingConfig, data: Dataset, ctx: Context, tests: dict[str, Dataset] | None = None) -> Model:
    """Train a vector for each word.

    `tests`: files of word pairs with human similarity scores, or of analogies (assets wordsim353, simlex999,
    word-analogies).

    Errors: DataError for too small a corpus or a test that cannot be read; MissingDependency without gensim or
    scikit-learn.
    """
    _require_dependencies()
    import numpy as np

    if taken := {"words", "text_words", "warnings"} & set(tests or {}):
        raise UserError(f"a test cannot be named {min(taken)!r}, which is already a metric; give it another name")
    test_sets = {name: read_word_test(test.path, lowercase=config.lowercase) for name, test in (tests or {}).items()}
    counts = _count_words(config, data, ctx)
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [word for word, times in frequent if times >= config.min_count][: config.max_final_vocab]
    if len(words) < max(10, config.vector_size // 10):
        raise DataError(
            f"{data.name}: only {len(words)} words occur {config.min_count} times or more; give more text, or lower"
            " config.min_count"
        )
    word_vectors = (_train_glove if config.method == "glove" else _train_gensim)(config, data, words, counts, ctx)
    if not np.isfinite(word_vectors.table).all():
        rate = config.learning_rate or "its default"
        raise TrainingError(f"training diverged: vectors are NaN or infinite; lower learning_rate ({rate})")
    _save_vectors(word_vectors, config, counts, ctx.out)
    metrics: dict[str, float] = {"words": len(words), "text_words": sum(counts.values())}
    rows: list[tuple[Any, ...]] = []
    lines: list[str] = []
    results_by_kind: dict[str, dict[str, WordScore]] = {}
    for name, test in test_sets.items():
        if isinstance(test, Analogies):
            found = score_analogies(test, {word: i for i, word in enumerate(word_vectors.words)}, word_vectors.table)
            results_by_kind[name], score = found, found["all"]
        else:
            score = score_similarity(test, word_vectors.lookup)
        rows.append(_build_score_row(name, score))
        metrics |= {name: 0.0 if math.isnan(score.score) else round(score.score, 4), f"{name}_answered": score.answered}
        lines.append(
            f"{name} {'has no score' if math.isnan(score.score) else f'{score.score:.3f}'} ({score.answered} of"
            f" {score.questions} covered)"
        )
    report = ctx.report
    report.title = f"{len(words):,} words of {data.name} ({config.method})"
    report.subtitle = f"Vectors of {config.vector_size} dimensions, trained on {sum(counts.values()):,} words." + (
        f" {'; '.join(lines)}." if lines else ""
    )
    _report_scores(word_vectors, metrics, report, ctx, rows, results_by_kind)
    _report_neighbors(word_vectors, counts, ctx)
    report.data |= {**metrics, "method": config.method}
    ctx.progress.log(report.subtitle)
    return Model(
        ctx.out,
        metrics=metrics,
        about={"format": "static-vectors", "architecture": config.method, "dimensions": config.vector_size},
    )


def _report_scores(
    word_vectors: WordVectors,
    metrics: dict[str, float],
    report: ReportBuilder,
    ctx: Context,
    rows: list[tuple[Any, ...]],
    results_by_kind: dict[str, dict[str, WordScore]],
) -> None:
    """Report scores, and warn when the vectors have collapsed to one direction."""
    mean_cosine = mean_random_cosine(word_vectors.table)
    metrics["warnings"] = int(mean_cosine > COLLAPSE_THRESHOLD)
    if mean_cosine > COLLAPSE_THRESHOLD:
        warning = (
            f"vectors have collapsed: two random words have a mean cosine of {mean_cosine:.2f}; the corpus or the"
            " number of"
            " epochs is too small; give more text, more epochs, or a larger sample"
        )
        report.add_text("Warnings", warning)
        ctx.progress.log(f"warning: {warning}")
    if rows:
        report.add_table(
            "Scores",
            ("test", "score", "low", "high", "covered", "questions"),
            rows,
            note=(
                "Pairs: Spearman's rank correlation with human scores; analogies: accuracy. Only questions whose words"
                " have vectors are covered; 95 % confidence intervals."
            ),
        )
    for name, found in results_by_kind.items():
        report.add_table(
            f"{name}, by kind",
            ("kind", "accuracy", "low", "high", "covered", "questions"),
            [_build_score_row(kind, one) for kind, one in found.items() if kind != "all"],
            note="The answer must be the nearest of all words; 95 % confidence intervals.",
        )


def mean_random_cosine(table: Any) -> float:
    """Return the mean cosine of random word pairs; near 1 when the vectors have collapsed to one direction."""
    import numpy as np

    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def _build_score_row(name: str, result: WordScore) -> tuple[Any, ...]:
    return (
        name,
        *(None if math.isnan(x) else round(x, 3) for x in (result.score, result.low, result.high)),
        result.answered,
        result.questions,
    )


def _require_dependencies() -> None:
    try:
        import gensim  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"word vectors need {error.name}; install it with: pip install 'llmworks[words]'"
        ) from None


def _iter_document_words(config: EmbeddingConfig, data: Dataset) -> Iterator[list[str]]:
    """Yield the words of each document."""
    from tokenizers import normalizers

    pattern, lower = (
        regex.compile(WORD),
        normalizers.Lowercase(),
    )  # str.lower treats a final sigma differently from the saved tokenizer
    for document in read_documents(data):
        yield pattern.findall(lower.normalize_str(document.text) if config.lowercase else document.text)


def _count_words(config: EmbeddingConfig, data: Dataset, ctx: Context) -> Counter[str]:
    counts: Counter[str] = Counter()
    with ctx.progress.bar("counting words", count_characters(data)[0], "documents") as bar:
        for text in _iter_document_words(config, data):
            counts.update(text)
            bar.advance()
    return counts


def _train_gensim(
    config: EmbeddingConfig, data: Dataset, words: list[str], counts: Counter[str], ctx: Context
) -> WordVectors:
    """Train Word2Vec or FastText with gensim."""
    import numpy as np
    from gensim.models import FastText, Word2Vec
    from gensim.models.callbacks import CallbackAny2Vec

    epochs = config.epochs or 5

    class Sentences:
        """Sentences of the documents, anew in each epoch; no sentence spans two documents."""

        def __iter__(self) -> Iterator[list[str]]:
            for text in _iter_document_words(config, data):
                yield from (text[i : i + SENTENCE_LENGTH] for i in range(0, len(text), SENTENCE_LENGTH))

    class ProgressCallback(CallbackAny2Vec):  # type: ignore[misc]
        def on_epoch_end(self, model: Any) -> None:
            bar.advance()

    options: dict[str, Any] = {
        "vector_size": config.vector_size,
        "window": config.window,
        "min_count": 1,
        "negative": config.negative,
        "sample": config.sample,
        "workers": config.workers,
        "seed": ctx.seed + 1,
        "sg": int(config.method != "cbow"),
        "alpha": config.learning_rate or (0.05 if config.method == "cbow" else 0.025),
    }
    ngrams = {"min_n": config.char_ngrams[0], "max_n": config.char_ngrams[1]}
    model = FastText(**ngrams, **options) if config.method == "fasttext" else Word2Vec(**options)
    model.build_vocab_from_freq({word: counts[word] for word in words}, corpus_count=0)
    with ctx.progress.bar("training", epochs, "epochs") as bar:
        model.train(Sentences(), total_words=sum(counts.values()), epochs=epochs, callbacks=[ProgressCallback()])
    if config.method == "fasttext":
        from gensim.models.fasttext import save_facebook_model

        save_facebook_model(model, str(ctx.out / "fasttext.bin"))
    table = np.stack([model.wv[word] for word in words]).astype(np.float32)
    if config.method == "fasttext":
        return WordVectors(words, table, lambda word: model.wv[word] if word else None)
    return _make_word_vectors(words, table)


def _train_glove(
    config: EmbeddingConfig, data: Dataset, words: list[str], counts: Counter[str], ctx: Context
) -> WordVectors:
    import numpy as np

    from llmworks.embed.glove import count_cooccurrences, train_glove

    place = {word: i for i, word in enumerate(words)}
    pairs = count_cooccurrences(
        (
            np.array([place.get(word, -1) for word in text], dtype=np.int32)
            for text in _iter_document_words(config, data)
        ),
        len(words),
        config.window,
    )
    if not len(pairs[0]):
        raise DataError(f"{data.name}: no co-occurring words in the window, which glove needs")
    epochs = config.epochs or 15
    with ctx.progress.bar("training", epochs, "epochs") as bar:
        vectors = train_glove(
            pairs,
            len(words),
            config.vector_size,
            epochs=epochs,
            learning_rate=config.learning_rate or 0.05,
            seed=ctx.seed,
            on_epoch=lambda epoch, loss: bar.advance(1, loss=loss),
        )
    return _make_word_vectors(words, vectors.numpy())


def _make_word_vectors(words: list[str], table: Any) -> WordVectors:
    """Return vectors of the vocabulary, without out-of-vocabulary words."""
    place = {word: i for i, word in enumerate(words)}
    return WordVectors(words, table, lambda word: table[place[word]] if word in place else None)


def _save_vectors(word_vectors: WordVectors, config: EmbeddingConfig, counts: Counter[str], out: Path) -> None:
    """Save the table and its tokenizer as `embed.static` reads them; unknown words get zeros."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *word_vectors.words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    if config.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.save(str(out / "tokenizer.json"))
    save_file(
        {"embedding": np.concatenate([np.zeros((1, word_vectors.table.shape[1]), np.float32), word_vectors.table])},
        out / "model.safetensors",
    )
    (out / "model.safetensors").chmod(0o644)
    (out / "embedding.json").write_text(
        json.dumps({"method": config.method, "words": len(word_vectors.words), "dimensions": config.vector_size})
        + "\n",
        encoding="utf-8",
    )
    if config.method != "fasttext":
        from gensim.models import KeyedVectors

        vectors = KeyedVectors(config.vector_size)
        vectors.add_vectors(word_vectors.words, word_vectors.table)
        for word in word_vectors.words:
            vectors.set_vecattr(word, "count", counts[word])  # else gensim warns about a missing order
        vectors.save_word2vec_format(str(out / "vectors.bin"), binary=True)


def _report_neighbors(word_vectors: WordVectors, counts: Counter[str], ctx: Context) -> None:
    """Report nearest neighbors and a 2-D map of frequent words."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    from sklearn.manifold import TSNE

    unit = word_vectors.table / np.maximum(np.linalg.norm(word_vectors.table, axis=1, keepdims=True), 1e-12)
    content_words = [
        i
        for i, word in enumerate(word_vectors.words)
        if len(word) > 2 and word.isalpha() and word.lower() not in ENGLISH_STOP_WORDS
    ]
    rows = []
    for i in content_words[:: max(1, min(len(content_words), 1000) // NUM_EXAMPLES)][:NUM_EXAMPLES]:
        fits = unit @ unit[i]
        fits[i] = -np.inf
        best = np.argsort(-fits, kind="stable")[:NUM_NEIGHBORS]
        rows.append(
            (
                word_vectors.words[i],
                counts[word_vectors.words[i]],
                ", ".join(f"{word_vectors.words[j]} {fits[j]:.2f}" for j in best),
            )
        )
    ctx.report.add_table("Nearest words", ("word", "count", "nearest neighbors with cosine"), rows)
    chosen = content_words[:NUM_MAP_WORDS]
    if len(chosen) < 3 * NUM_CLUSTERS:
        return
    points = TSNE(
        2, perplexity=min(15, (len(chosen) - 1) / 3), metric="cosine", init="random", random_state=ctx.seed, n_jobs=1
    ).fit_transform(unit[chosen])
    groups = KMeans(NUM_CLUSTERS, random_state=ctx.seed, n_init=4).fit_predict(unit[chosen])
    ctx.report.add_points(
        "Word map",
        [
            (word_vectors.words[i], float(x), float(y), int(group))
            for i, (x, y), group in zip(chosen, points, groups, strict=True)
        ],
        note=(
            f"The {len(chosen)} most frequent content words, by t-SNE on cosine distance; colors are k-means clusters"
            " of the original vectors."
        ),
    )
