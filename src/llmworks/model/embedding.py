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
from llmworks.embed.word_similarity import Analogies, Found, Vector, likeness, read, solve

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

WORD = r"[\p{L}\p{M}]+(?:['’][\p{L}\p{M}]+)*|\p{N}+"  # also the pattern of the saved tokenizer
LINE = 10_000  # words per sentence passed to gensim
NEAR, SHOWN, DRAWN, CLUSTERS = 8, 24, 260, 12
UNKNOWN = "<unk>"
ALIKE = 0.8  # mean cosine of random word pairs above which a warning is given


class EmbeddingConfig(Config):
    """Word-vector training settings."""

    method: Literal["skip-gram", "cbow", "fasttext", "glove"] = Field(
        "skip-gram",
        description=(
            "skip-gram: predict the context from a word; cbow: predict a word from its context (Mikolov et al. 2013);"
            " fasttext: skip-gram with character n-grams (Bojanowski et al. 2017); glove: factorize co-occurrence"
            " counts (Pennington et al. 2014)"
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
            raise ValueError(
                f"char_ngrams is {list(self.char_ngrams)}: needs a minimum of at least 1 and a maximum of at least the"
                " minimum and at most 20"
            )
        return self


@dataclass(frozen=True)
class Made:
    """Trained words, most frequent first, their vectors [words, dimensions] in fp32, and a lookup (None if unknown)."""

    words: list[str]
    table: Any
    vector: Vector


def embedding(config: EmbeddingConfig, data: Dataset, ctx: Context, tests: dict[str, Dataset] | None = None) -> Model:
    """Train a vector for each word.

    `tests`: files of word pairs with human similarity scores, or of analogies (assets wordsim353, simlex999,
    word-analogies).

    Errors: DataError for too small a corpus or a test that cannot be read; MissingDependency without gensim or
    scikit-learn.
    """
    _require()
    import numpy as np

    if taken := {"words", "text_words", "warnings"} & set(tests or {}):
        raise UserError(f"a test cannot be named {min(taken)!r}, which is already a metric; give it another name")
    asked = {name: read(test.path, lowercase=config.lowercase) for name, test in (tests or {}).items()}
    counts = _count(config, data, ctx)
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [word for word, times in frequent if times >= config.min_count][: config.max_final_vocab]
    if len(words) < max(10, config.vector_size // 10):
        raise DataError(
            f"{data.name}: only {len(words)} words occur {config.min_count} times or more; give more text, or lower"
            " config.min_count"
        )
    made = (_glove if config.method == "glove" else _gensim)(config, data, words, counts, ctx)
    if not np.isfinite(made.table).all():
        rate = config.learning_rate or "its default"
        raise TrainingError(f"training diverged: vectors are NaN or infinite; lower learning_rate ({rate})")
    _save(made, config, counts, ctx.out)
    metrics: dict[str, float] = {"words": len(words), "text_words": sum(counts.values())}
    rows: list[tuple[Any, ...]] = []
    lines: list[str] = []
    kinds: dict[str, dict[str, Found]] = {}
    for name, test in asked.items():
        if isinstance(test, Analogies):
            found = solve(test, {word: i for i, word in enumerate(made.words)}, made.table)
            kinds[name], score = found, found["all"]
        else:
            score = likeness(test, made.vector)
        rows.append(_row(name, score))
        metrics |= {name: 0.0 if math.isnan(score.score) else round(score.score, 4), f"{name}_answered": score.answered}
        lines.append(
            f"{name} {'has no score' if math.isnan(score.score) else f'{score.score:.3f}'} ({score.answered} of"
            f" {score.questions} covered)"
        )
    report = ctx.report
    report.title = f"{len(words):,} words of {data.name} ({config.method})"
    report.lead = f"Vectors of {config.vector_size} dimensions, trained on {sum(counts.values()):,} words." + (
        f" {'; '.join(lines)}." if lines else ""
    )
    _describe_scores(made, metrics, report, ctx, rows, kinds)
    _look(made, counts, ctx)
    report.data |= {**metrics, "method": config.method}
    ctx.progress.say(report.lead)
    return Model(
        ctx.out,
        metrics=metrics,
        about={"format": "static-vectors", "architecture": config.method, "dimensions": config.vector_size},
    )


def _describe_scores(
    made: Made,
    metrics: dict[str, float],
    report: ReportBuilder,
    ctx: Context,
    rows: list[tuple[Any, ...]],
    kinds: dict[str, dict[str, Found]],
) -> None:
    """Report scores, and warn when the vectors have collapsed to one direction."""
    alike = collapsed(made.table)
    metrics["warnings"] = int(alike > ALIKE)
    if alike > ALIKE:
        warning = (
            f"vectors have collapsed: two random words have a mean cosine of {alike:.2f}; the corpus or the number of"
            " epochs is too small; give more text, more epochs, or a larger sample"
        )
        report.text("Warnings", warning)
        ctx.progress.say(f"warning: {warning}")
    if rows:
        report.table(
            "Scores",
            ("test", "score", "low", "high", "covered", "questions"),
            rows,
            note=(
                "Pairs: Spearman's rank correlation with human scores; analogies: accuracy. Only questions whose words"
                " have vectors are covered; 95 % confidence intervals."
            ),
        )
    for name, found in kinds.items():
        report.table(
            f"{name}, by kind",
            ("kind", "accuracy", "low", "high", "covered", "questions"),
            [_row(kind, one) for kind, one in found.items() if kind != "all"],
            note="The answer must be the nearest of all words; 95 % confidence intervals.",
        )


def collapsed(table: Any) -> float:
    """Return the mean cosine of random word pairs; near 1 when the vectors have collapsed to one direction."""
    import numpy as np

    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def _row(name: str, found: Found) -> tuple[Any, ...]:
    return (
        name,
        *(None if math.isnan(x) else round(x, 3) for x in (found.score, found.low, found.high)),
        found.answered,
        found.questions,
    )


def _require() -> None:
    try:
        import gensim  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"word vectors need {error.name}; install it with: pip install 'llmworks[words]'"
        ) from None


def _texts(config: EmbeddingConfig, data: Dataset) -> Iterator[list[str]]:
    """Yield the words of each document."""
    from tokenizers import normalizers

    pattern, lower = (
        regex.compile(WORD),
        normalizers.Lowercase(),
    )  # str.lower treats a final sigma differently from the saved tokenizer
    for document in read_documents(data):
        yield pattern.findall(lower.normalize_str(document.text) if config.lowercase else document.text)


def _count(config: EmbeddingConfig, data: Dataset, ctx: Context) -> Counter[str]:
    counts: Counter[str] = Counter()
    with ctx.progress.bar("counting words", count_characters(data)[0], "documents") as bar:
        for text in _texts(config, data):
            counts.update(text)
            bar.advance()
    return counts


def _gensim(config: EmbeddingConfig, data: Dataset, words: list[str], counts: Counter[str], ctx: Context) -> Made:
    """Train Word2Vec or FastText with gensim."""
    import numpy as np
    from gensim.models import FastText, Word2Vec
    from gensim.models.callbacks import CallbackAny2Vec

    epochs = config.epochs or 5

    class Lines:
        """Sentences of the documents, anew in each epoch; no sentence spans two documents."""

        def __iter__(self) -> Iterator[list[str]]:
            for text in _texts(config, data):
                yield from (text[i : i + LINE] for i in range(0, len(text), LINE))

    class Shown(CallbackAny2Vec):  # type: ignore[misc]
        def on_epoch_end(self, model: Any) -> None:
            bar.advance()

    usual: dict[str, Any] = {
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
    model = (
        FastText(min_n=config.char_ngrams[0], max_n=config.char_ngrams[1], **usual)
        if config.method == "fasttext"
        else Word2Vec(**usual)
    )
    model.build_vocab_from_freq({word: counts[word] for word in words}, corpus_count=0)
    with ctx.progress.bar("training", epochs, "epochs") as bar:
        model.train(Lines(), total_words=sum(counts.values()), epochs=epochs, callbacks=[Shown()])
    if config.method == "fasttext":
        from gensim.models.fasttext import save_facebook_model

        save_facebook_model(model, str(ctx.out / "fasttext.bin"))
        return Made(
            words,
            np.stack([model.wv[word] for word in words]).astype(np.float32),
            lambda word: model.wv[word] if word else None,
        )
    return _known(words, np.stack([model.wv[word] for word in words]).astype(np.float32))


def _glove(config: EmbeddingConfig, data: Dataset, words: list[str], counts: Counter[str], ctx: Context) -> Made:
    import numpy as np

    from llmworks.embed.glove import cooccurrences, glove

    place = {word: i for i, word in enumerate(words)}
    pairs = cooccurrences(
        (np.array([place.get(word, -1) for word in text], dtype=np.int32) for text in _texts(config, data)),
        len(words),
        config.window,
    )
    if not len(pairs[0]):
        raise DataError(f"{data.name}: no co-occurring words in the window, which glove needs")
    epochs = config.epochs or 15
    with ctx.progress.bar("training", epochs, "epochs") as bar:
        vectors = glove(
            pairs,
            len(words),
            config.vector_size,
            epochs=epochs,
            rate=config.learning_rate or 0.05,
            seed=ctx.seed,
            each=lambda epoch, loss: bar.advance(1, loss=loss),
        )
    return _known(words, vectors.numpy())


def _known(words: list[str], table: Any) -> Made:
    """Return vectors of the vocabulary, without out-of-vocabulary words."""
    place = {word: i for i, word in enumerate(words)}
    return Made(words, table, lambda word: table[place[word]] if word in place else None)


def _save(made: Made, config: EmbeddingConfig, counts: Counter[str], out: Path) -> None:
    """Save the table and its tokenizer as `embed.static` reads them; unknown words get zeros."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *made.words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    if config.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    tokenizer.save(str(out / "tokenizer.json"))
    save_file(
        {"embedding": np.concatenate([np.zeros((1, made.table.shape[1]), np.float32), made.table])},
        out / "model.safetensors",
    )
    (out / "model.safetensors").chmod(0o644)
    (out / "embedding.json").write_text(
        json.dumps({"method": config.method, "words": len(made.words), "dimensions": config.vector_size}) + "\n",
        encoding="utf-8",
    )
    if config.method != "fasttext":
        from gensim.models import KeyedVectors

        vectors = KeyedVectors(config.vector_size)
        vectors.add_vectors(made.words, made.table)
        for word in made.words:
            vectors.set_vecattr(word, "count", counts[word])  # else gensim warns about a missing order
        vectors.save_word2vec_format(str(out / "vectors.bin"), binary=True)


def _look(made: Made, counts: Counter[str], ctx: Context) -> None:
    """Report nearest neighbors and a 2-D map of frequent words."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    from sklearn.manifold import TSNE

    unit = made.table / np.maximum(np.linalg.norm(made.table, axis=1, keepdims=True), 1e-12)
    telling = [
        i
        for i, word in enumerate(made.words)
        if len(word) > 2 and word.isalpha() and word.lower() not in ENGLISH_STOP_WORDS
    ]
    rows = []
    for i in telling[:: max(1, min(len(telling), 1000) // SHOWN)][:SHOWN]:
        fits = unit @ unit[i]
        fits[i] = -np.inf
        best = np.argsort(-fits, kind="stable")[:NEAR]
        rows.append((made.words[i], counts[made.words[i]], ", ".join(f"{made.words[j]} {fits[j]:.2f}" for j in best)))
    ctx.report.table("Nearest words", ("word", "count", "nearest neighbors with cosine"), rows)
    chosen = telling[:DRAWN]
    if len(chosen) < 3 * CLUSTERS:
        return
    points = TSNE(
        2, perplexity=min(15, (len(chosen) - 1) / 3), metric="cosine", init="random", random_state=ctx.seed, n_jobs=1
    ).fit_transform(unit[chosen])
    groups = KMeans(CLUSTERS, random_state=ctx.seed, n_init=4).fit_predict(unit[chosen])
    ctx.report.points(
        "Word map",
        [
            (made.words[i], float(x), float(y), int(group))
            for i, (x, y), group in zip(chosen, points, groups, strict=True)
        ],
        note=(
            f"The {len(chosen)} most frequent content words, by t-SNE on cosine distance; colors are k-means clusters"
            " of the original vectors."
        ),
    )
