"""Stage `data.map`: plot a dataset as a 2-D map of document embeddings, with k-means clusters and their terms.

Embeddings come from an embedding model, or from TF-IDF with truncated SVD; t-SNE (van der Maaten and Hinton 2008) or
PCA projects them to two dimensions.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import DataError, MissingDependency
from llmworks.core.types import Document

if TYPE_CHECKING:
    from llmworks.data.text.hashing import Array

MIN_DOCUMENTS = 10
DIMENSIONS = 50
MAX_TERMS = 6
SNIPPET_CHARACTERS = 220
MAX_COLORS = 12  # values of a field that get a color of their own


class MapConfig(Config):
    """Sample size, clustering and layout of the map."""

    max_documents: int = Field(
        3000, ge=MIN_DOCUMENTS, description="documents on the map; larger datasets are sampled at random"
    )
    n_clusters: int = Field(12, ge=2, le=60, description="number of k-means clusters")
    layout: Literal["tsne", "pca"] = Field(
        "tsne", description="tsne: preserves neighborhoods; pca: the first two principal components"
    )
    perplexity: float = Field(30.0, gt=1, description="t-SNE perplexity: the effective number of neighbors")
    color_by: list[str] = Field(
        default_factory=lambda: ["mix", "language", "source"],
        description="`source` or metadata fields by which points can be colored",
    )
    seed: int = Field(0, description="seed of the sample, the clusters and the layout")


def map(config: MapConfig, data: Dataset, ctx: Context, embedder: Model | None = None) -> Report:
    """Write map.html (interactive, self-contained), map.png, points.json and a report of the clusters.

    Errors: DataError with fewer than 10 documents; MissingDependency without the extra `corpus`.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "data.map needs scikit-learn; install it with: pip install 'llmworks[corpus]'"
        ) from None
    documents, total = sample_documents(data, config)
    if len(documents) < MIN_DOCUMENTS:
        raise DataError(
            f"{data.name}: {len(documents)} documents are too few for a map; at least {MIN_DOCUMENTS} are needed"
        )
    texts = [document.text[:5000] for document in documents]
    matrix, words = tfidf(texts)
    vectors = embed(texts, embedder) if embedder else reduce_dimensions(matrix, config.seed)
    labels = cluster(vectors, min(config.n_clusters, len(documents) // 2), config.seed)
    terms = cluster_terms(matrix, words, labels)
    points = project(vectors, config)
    groups = {
        "cluster": [f"{label + 1}: {', '.join(terms[label][:3])}" for label in labels],
        **collect_color_values(documents, config.color_by),
    }
    rows = [
        {
            "id": d.id,
            "x": round(float(x), 3),
            "y": round(float(y), 3),
            "text": " ".join(d.text[:SNIPPET_CHARACTERS].split()),
            **{name: values[i] for name, values in groups.items()},
        }
        for i, (d, (x, y)) in enumerate(zip(documents, points, strict=True))
    ]
    how = f"{embedder.name} vectors" if embedder else "TF-IDF"
    (ctx.out / "points.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (ctx.out / "map.html").write_text(
        render_page(f"{data.name}: {len(rows):,} documents, {how}", rows, list(groups)), encoding="utf-8"
    )
    draw_map(
        points, labels, terms, ctx.out / "map.png", f"{data.name}: {len(rows):,} documents, {how}, {config.layout}"
    )
    report = ctx.report
    report.title = f"Map of {data.name}"
    report.subtitle = (
        f"{len(rows):,} of {total:,} documents by {how}, projected by {config.layout}; open map.html to explore them."
    )
    sizes = Counter(labels)
    report.data = {"documents": len(rows), "clusters": [{"size": sizes[i], "terms": terms[i]} for i in sorted(terms)]}
    report.add_picture("Map", ctx.out / "map.png", "Colors are the clusters of the table below.")
    report.add_table(
        "Clusters",
        ("cluster", "documents", "terms"),
        [(i + 1, sizes[i], ", ".join(terms[i])) for i in sorted(terms, key=lambda i: -sizes[i])],
    )
    return Report(ctx.out, metrics={"documents": len(rows), "clusters": len(sizes)})


def sample_documents(data: Dataset, config: MapConfig) -> tuple[list[Document], int]:
    """Return (sampled documents in their order, total number of documents); reservoir sampling (Vitter 1985)."""
    choose = random.Random(config.seed)
    kept: list[tuple[int, Document]] = []
    total = 0
    for place, document in enumerate(read_documents(data)):
        total += 1
        if place < config.max_documents:
            kept.append((place, document))
        elif (at := choose.randrange(place + 1)) < config.max_documents:
            kept[at] = (place, document)
    return [document for _, document in sorted(kept, key=lambda item: item[0])], total


def tfidf(texts: Sequence[str]) -> tuple[Any, list[str]]:
    """Return (TF-IDF matrix [texts, words], the words), without English stop words and very rare or common words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    least = 2 if len(texts) >= 50 else 1
    try:
        vectorizer = TfidfVectorizer(
            max_features=20_000,
            min_df=least,
            max_df=0.5,
            stop_words="english",
            sublinear_tf=True,
            token_pattern=r"(?u)\b[^\W\d_]{2,}\b",
        )
        matrix = vectorizer.fit_transform(texts)
    except ValueError:  # every word is a stop word or in one text only
        vectorizer = TfidfVectorizer(analyzer="char", max_features=2000)
        matrix = vectorizer.fit_transform(texts)
    return matrix, list(vectorizer.get_feature_names_out())


def reduce_dimensions(matrix: Any, seed: int) -> Array:
    """Reduce a sparse matrix by truncated SVD (latent semantic analysis); rows are normalized to unit length."""
    import numpy as np
    from sklearn.decomposition import TruncatedSVD

    size = max(2, min(DIMENSIONS, min(matrix.shape) - 1))
    vectors = TruncatedSVD(size, random_state=seed).fit_transform(matrix)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Array = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return found


def embed(texts: list[str], embedder: Model) -> Array:
    """Embed the texts with the embedding model."""
    from llmworks.embed import load_embedder

    return load_embedder(embedder.path).encode(texts)


def cluster(vectors: Array, count: int, seed: int) -> list[int]:
    """Return the k-means cluster of each row; clusters are numbered by size, the largest is 0."""
    from sklearn.cluster import KMeans

    found = KMeans(count, random_state=seed, n_init=4).fit_predict(vectors).tolist()
    order = [label for label, _ in sorted(Counter(found).items(), key=lambda item: (-item[1], item[0]))]
    return [order.index(label) for label in found]


def cluster_terms(matrix: Any, words: list[str], labels: Sequence[int]) -> dict[int, list[str]]:
    """Return the terms whose mean TF-IDF in a cluster exceeds the overall mean most, the most distinctive first."""
    import numpy as np

    own = np.array(labels)
    overall = np.asarray(matrix.mean(axis=0)).ravel()
    found = {}
    for label in sorted(set(labels)):
        lift = np.asarray(matrix[own == label].mean(axis=0)).ravel() - overall
        found[label] = [words[i] for i in np.argsort(-lift, kind="stable")[:MAX_TERMS] if lift[i] > 0] or [
            "(no distinctive terms)"
        ]
    return found


def project(vectors: Array, config: MapConfig) -> Array:
    """Project the embeddings to points [rows, 2]."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    narrow = PCA(min(DIMENSIONS, *vectors.shape), random_state=config.seed).fit_transform(vectors)
    if config.layout == "pca" or narrow.shape[1] < 2:
        points: Array = narrow[:, :2]
        return points
    perplexity = min(config.perplexity, (len(vectors) - 1) / 3)
    laid: Array = TSNE(2, perplexity=perplexity, init="pca", random_state=config.seed, n_jobs=1).fit_transform(narrow)
    return laid


def collect_color_values(documents: Sequence[Document], fields: Sequence[str]) -> dict[str, list[str]]:
    """Return the documents' values of each field that has more than one value; rare values become 'other'."""
    found = {}
    for field in fields:
        values = [
            document.source if field == "source" else str(document.metadata.get(field, "none"))
            for document in documents
        ]
        common = {value for value, _ in Counter(values).most_common(MAX_COLORS)}
        if len(set(values)) > 1:
            found[field] = [value if value in common else "other" for value in values]
    return found


def draw_map(points: Array, labels: Sequence[int], terms: dict[int, list[str]], path: Path, title: str) -> None:
    """Draw the map as a PNG, with each cluster labeled at its median."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    own = np.array(labels)
    palette = colormaps["tab20"]
    for label in sorted(terms):
        some = points[own == label]
        axes.scatter(some[:, 0], some[:, 1], s=9, color=palette(label % 20), linewidths=0, alpha=0.75)
    for label in sorted(terms):
        x, y = np.median(points[own == label], axis=0)
        axes.annotate(
            ", ".join(terms[label][:3]),
            (x, y),
            ha="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.2", "fc": "white", "ec": "#999", "alpha": 0.8},
        )
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    figure.savefig(path, metadata={"Software": None})


def render_page(title: str, rows: list[dict[str, Any]], fields: list[str]) -> str:
    """Return the interactive map as one self-contained HTML page."""
    import html

    data = json.dumps({"rows": rows, "fields": fields}, ensure_ascii=False).replace("</", "<\\/")
    source = Path(__file__).with_name("map.template.html").read_text(encoding="utf-8")
    return source.replace("{{title}}", html.escape(title)).replace("{{data}}", data)
