"""Stage `data.dedup`: deduplicate documents by exact hashes, MinHash near-duplicates and repeated lines.

Three passes: hash every part, cluster by the hashes alone, write every part without its duplicates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import Json
from llmworks.data.card import finish_dataset
from llmworks.data.duplicates.dropping import DuplicateDrop, read_plan, save_plan, show_pairs, write_kept
from llmworks.data.duplicates.exact import Exact
from llmworks.data.duplicates.lines import Lines
from llmworks.data.duplicates.near import Near
from llmworks.data.store.parts import PartResults, Span, plan_spans, process_parts

if TYPE_CHECKING:
    from llmworks.data.text.hashing import Array

HASHES, SCORES = "numbers.npy", "scores.npy"


class DedupConfig(Config):
    """Types of duplicates to remove (null disables one), and the document of each cluster to keep."""

    exact: Exact | None = Field(default_factory=Exact, description="exact duplicates: the same bytes or the same words")
    near: Near | None = Field(
        default_factory=Near, description="near-duplicates: MinHash LSH, verified by Jaccard similarity"
    )
    lines: Lines | None = Field(None, description="lines repeated in many documents")
    keep: Literal["longest", "first", "highest"] = Field(
        "longest", description="document of a cluster to keep; highest: the one with the highest score_field"
    )
    score_field: str = Field("quality", description="numeric metadata field compared by keep: highest")

    @model_validator(mode="after")
    def _check_methods(self) -> Self:
        if not (self.exact or self.near or self.lines):
            raise ValueError("exact, near and lines are all null: set at least one")
        return self


def dedup(config: DedupConfig, data: Dataset, ctx: Context) -> Dataset:
    """Keep one document of every cluster; the others go to `dropped/` with the id of the kept one (`duplicate_of`).

    Errors: DataError when a document has no numeric score_field; MissingDependency without the extra `corpus`.
    """
    import numpy as np

    parts = plan_spans(data)
    rows = sum(part.rows for part in parts)
    hashed = process_parts(ctx, "hash", partial(hash_part, config), parts)
    drops, sizes, facts = _cluster_duplicates(config, hashed, rows, ctx)
    plan = save_plan(ctx, parts, drops)
    if config.lines:
        from llmworks.data.duplicates.lines import find_repeated_lines

        counted = process_parts(ctx, "lines", partial(_count_lines, config.lines, plan), list(enumerate(parts)))
        numbers, first = find_repeated_lines(config.lines, counted.folders)
        np.savez(plan / "lines.npz", numbers=numbers, first=first)
        facts["repeated_lines"] = len(numbers)
    done = write_kept(ctx, parts, plan, config.lines)
    _report(config, ctx, data, parts, drops, sizes, facts, done)
    dropped = done.sum_counters("dropped")
    metrics = {
        "documents": done.sum_values("kept"),
        "dropped": dropped.total(),
        "characters": done.sum_values("characters"),
        "clusters": sizes.total(),
        "lines": done.sum_values("lines"),
        **facts,
    }
    return finish_dataset(ctx, "data.dedup", [data], dropped=dict(dropped.most_common()), metrics=metrics)


def hash_part(config: DedupConfig, part: Span, folder: Path) -> Json:
    """Write the hashes of a part: exact hashes, shingle sets and MinHash bands, and a score for each document."""
    import numpy as np

    from llmworks.data.duplicates import exact, near
    from llmworks.data.text import hashing

    numbers: list[Array] = []
    scores: list[Array] = []
    signatures: list[Array] = []
    counts: list[Array] = []
    by_words = config.exact is not None and config.exact.match == "words"
    with (folder / near.SHINGLES).open("wb") as shingles:
        for table in part.tables(("text", "metadata") if config.keep == "highest" else ("text",)):
            scores.append(_compute_scores(config, table, part))
            if config.exact and not by_words:
                numbers.append(exact.hash_texts(table["text"]))
            if not (config.near or by_words):
                continue
            for words in hashing.hash_words(table["text"]):
                if by_words:
                    numbers.append(exact.hash_sequences(words))
                if config.near:
                    sets = hashing.unique_hashes(hashing.hash_shingles(words, config.near.ngram_size))
                    sets.values.tofile(shingles)
                    counts.append(sets.counts)
                    signatures.append(
                        near.hash_bands(near.minhash_signatures(sets, config.near.num_perm), config.near.rows_per_band)
                    )
    np.save(folder / HASHES, np.concatenate(numbers) if numbers else np.zeros(part.rows, np.uint64))
    np.save(folder / SCORES, np.concatenate(scores))
    if config.near:
        np.save(folder / near.STARTS, np.concatenate(([0], np.cumsum(np.concatenate(counts)))))
        np.save(folder / near.BANDS, np.concatenate(signatures, axis=1))
    return {"rows": part.rows}


def _compute_scores(config: DedupConfig, table: Any, part: Span) -> Array:
    import numpy as np
    import pyarrow.compute as pc

    if config.keep == "longest":
        return np.asarray(pc.binary_length(table["text"]).to_numpy(), dtype=np.float64)
    if config.keep == "first":
        return np.zeros(table.num_rows)
    found = [
        json.loads(metadata).get(config.score_field) if metadata.startswith("{") else None
        for metadata in table["metadata"].to_pylist()
    ]
    wrong = next((i for i, value in enumerate(found) if not isinstance(value, (int, float))), None)
    if wrong is not None:
        raise DataError(
            f"{part.file}: a document has no numeric {config.score_field!r} (score_field) in its metadata, needed"
            " by keep"
        )
    return np.array(found, dtype=np.float64)


def _cluster_duplicates(
    config: DedupConfig, hashed: PartResults, rows: int, ctx: Context
) -> tuple[dict[int, DuplicateDrop], Counter[int], Json]:
    """Cluster the duplicates; returns (reason for each dropped row, counts of cluster sizes, metrics)."""
    import numpy as np

    from llmworks.data.duplicates import near
    from llmworks.data.duplicates.clusters import Clusters, choose_best, group_equal_values

    clusters = Clusters(rows)
    equal = np.concatenate([np.load(folder / HASHES) for folder in hashed.folders])
    for same in group_equal_values(equal):
        for row in same[1:].tolist():
            clusters.join(int(same[0]), row)
    facts: Json = {}
    if config.near:
        # only one document of each exact cluster is compared
        chosen = np.array([row for row in range(rows) if clusters.find(row) == row])
        facts["compared_pairs"], facts["merged_pairs"] = near.cluster_near_duplicates(
            config.near, hashed.folders, clusters, chosen
        )
    scores = np.concatenate([np.load(folder / SCORES) for folder in hashed.folders])
    drops: dict[int, DuplicateDrop] = {}
    sizes: Counter[int] = Counter()
    sets = near.ShingleSets(hashed.folders) if config.near else None
    for group in clusters.members():
        kept = choose_best(group, scores)
        sizes[len(group)] += 1
        for row in group:
            if row == kept:
                continue
            if equal[row] and equal[row] == equal[kept]:
                drops[row] = DuplicateDrop("exact duplicate", kept, 1.0)
            else:
                drops[row] = DuplicateDrop("near-duplicate", kept, round(sets.jaccard(row, kept), 4) if sets else 1.0)
    if sets:
        sets.close()
    return drops, sizes, facts


def _count_lines(config: Lines, plan: Path, unit: tuple[int, Span], folder: Path) -> Json:
    """Write (line hash, row) pairs of the documents that are kept."""
    import numpy as np

    from llmworks.data.duplicates import lines

    index, part = unit
    drops = read_plan(plan, index)
    found: list[Array] = []
    row = part.row
    for table in part.tables(("text",)):
        for text in table["text"].to_pylist():
            if str(row - part.row) not in drops:
                own = sorted(set(lines.hash_lines(config, text)) - {0})
                found.append(np.array([(number, row) for number in own], dtype=lines.PAIR))
            row += 1
    np.save(folder / lines.LINES, np.concatenate(found) if found else np.zeros(0, lines.PAIR))
    return {}


def _report(
    config: DedupConfig,
    ctx: Context,
    data: Dataset,
    parts: Sequence[Span],
    drops: dict[int, DuplicateDrop],
    sizes: Counter[int],
    facts: Json,
    done: PartResults,
) -> None:
    report = ctx.report
    kept, dropped = done.sum_values("kept"), done.sum_counters("dropped")
    every = kept + dropped.total()
    report.title = f"{data.name} after deduplication"
    report.subtitle = (
        f"{kept:,} of {every:,} documents are kept ({kept / max(every, 1):.1%}); {sizes.total():,} clusters."
    )
    if config.near:
        near = config.near
        report.subtitle += (
            f" {facts['compared_pairs']:,} candidate pairs were compared, {facts['merged_pairs']:,} merged (Jaccard"
            " similarity of"
            f" {near.ngram_size}-gram shingles at least {near.threshold})."
        )
    report.data = {
        "kept": kept,
        "dropped": dict(dropped),
        "cluster_sizes": {str(k): v for k, v in sorted(sizes.items())},
        **facts,
    }
    report.add_table(
        "Dropped",
        ("reason", "documents", "share"),
        [(r, n, f"{n / every:.2%}") for r, n in dropped.most_common()],
        note="They are in dropped/ with duplicate_of and similarity.",
    )
    if sizes:
        report.add_table("Clusters", ("cluster size", "clusters"), sorted(sizes.items()))
    if config.near:
        near = config.near
        curve = [(i / 50, _compute_candidate_probability(near, i / 50)) for i in range(51)]
        report.add_curves(
            "Probability of becoming a candidate pair",
            {"chance": curve},
            x="Jaccard similarity",
            y="probability",
            note=(
                f"{near.num_bands} bands of {near.rows_per_band} hashes. Candidates with a lower similarity than"
                f" {near.threshold} are discarded."
            ),
        )
    if config.lines:
        common = done.sum_counters("shown").most_common(20)
        report.add_table(
            "Repeated lines",
            ("line", "times removed"),
            [(line[:200], n) for line, n in common],
            note=f"{done.sum_values('lines'):,} lines were removed; the first occurrence of each is kept.",
        )
    show_pairs(report, parts, drops)


def _compute_candidate_probability(near: Near, similarity: float) -> float:
    from llmworks.data.duplicates.near import candidate_probability

    return candidate_probability(similarity, near.rows_per_band, near.num_bands)
