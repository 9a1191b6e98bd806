"""Stage `data.semdedup`: remove semantic duplicates by embedding similarity (SemDeDup, Abbas et al. 2023)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.types import Json
from llmworks.data.card import finish_dataset
from llmworks.data.duplicates.dropping import DuplicateDrop, save_plan, show_pairs, write_kept
from llmworks.data.store.parts import Span, plan_spans, process_parts

VECTORS, LENGTHS = "vectors.npy", "sizes.npy"


class SemdedupConfig(Config):
    """Similarity threshold, and the document of each cluster to keep."""

    threshold: float = Field(
        0.95, gt=0, le=1, description="minimum cosine similarity of duplicates; depends on the embedding model"
    )
    keep: Literal["longest", "first"] = Field("longest", description="document of a cluster to keep")
    seed: int = Field(0, description="seed of the k-means partition of large datasets")


def semdedup(config: SemdedupConfig, data: Dataset, embedder: Model, ctx: Context) -> Dataset:
    """Keep one document of every cluster; the others go to `dropped/` with `duplicate_of` and cosine similarity.

    Errors: ModelError when `embedder` is not an embedding model; MissingDependency without the extra `corpus` on large
    data.
    """
    import numpy as np

    from llmworks.data.duplicates.clusters import Clusters, choose_best
    from llmworks.data.duplicates.semantic import cluster_similar

    parts = plan_spans(data)
    rows = sum(part.rows for part in parts)
    done = process_parts(ctx, "embed", partial(_embed_part, embedder.path), parts)
    vectors = np.concatenate([np.load(folder / VECTORS) for folder in done.folders])
    by_length = config.keep == "longest"
    sizes = np.concatenate([np.load(folder / LENGTHS) for folder in done.folders]) if by_length else np.zeros(rows)
    clusters = Clusters(rows)
    compared, joined = cluster_similar(vectors, config.threshold, clusters, config.seed)
    drops: dict[int, DuplicateDrop] = {}
    counts: Counter[int] = Counter()
    for group in clusters.members():
        kept = choose_best(group, sizes)
        counts[len(group)] += 1
        for row in group:
            if row != kept:
                drops[row] = DuplicateDrop(
                    "like meaning",
                    kept,
                    round(float(vectors[row].astype(np.float32) @ vectors[kept].astype(np.float32)), 4),
                )
    written = write_kept(ctx, parts, save_plan(ctx, parts, drops))
    num_kept = written.sum_values("kept")
    report = ctx.report
    report.title = f"{data.name} after semantic deduplication"
    report.subtitle = (
        f"{num_kept:,} of {rows:,} documents are kept ({num_kept / max(rows, 1):.1%}); {joined:,} of {compared:,}"
        " pairs have a"
        f" cosine similarity of at least {config.threshold} under {embedder.name}."
    )
    report.data = {
        "kept": num_kept,
        "dropped": len(drops),
        "cluster_sizes": {str(k): v for k, v in sorted(counts.items())},
        "compared_pairs": compared,
    }
    if counts:
        report.add_table("Clusters", ("cluster size", "clusters"), sorted(counts.items()))
    show_pairs(report, parts, drops)
    metrics = {
        "documents": num_kept,
        "dropped": len(drops),
        "clusters": counts.total(),
        "compared_pairs": compared,
        "merged_pairs": joined,
    }
    return finish_dataset(
        ctx, "data.semdedup", [data], dropped={"like meaning": len(drops)} if drops else {}, metrics=metrics
    )


def _embed_part(path: Path, part: Span, folder: Path) -> Json:
    """Write the embeddings (fp16) and lengths of a part's documents."""
    import numpy as np

    from llmworks.embed import load_embedder

    embedder = load_embedder(path)
    vectors = []
    sizes: list[int] = []
    for table in part.tables(("text",)):
        texts = table["text"].to_pylist()
        vectors.append(embedder.encode(texts).astype(np.float16))
        sizes += [len(text) for text in texts]
    np.save(folder / VECTORS, np.concatenate(vectors))
    np.save(folder / LENGTHS, np.array(sizes, dtype=np.float64))
    return {"rows": part.rows}
