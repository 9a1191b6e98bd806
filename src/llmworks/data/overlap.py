"""Stage `data.overlap`: count what two sets of conversations share, so that a recipe can refuse to test on what it
trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmworks.core.artifact import Config, Dataset, Report
from llmworks.core.context import Context
from llmworks.data.store.rows import Row, read_chat


class OverlapConfig(Config):
    """No choices yet: exact groups, ids, and normalised user texts are compared."""


def overlap(config: OverlapConfig, left: Dataset, right: Dataset, ctx: Context) -> Report:
    """Count shared groups, ids and user texts (case and white space ignored) of two chat datasets."""
    a, b = read_chat(left), read_chat(right)
    shared = {
        "shared_groups": sorted({r["group"] for r in a} & {r["group"] for r in b}),
        "shared_ids": sorted({r["id"] for r in a} & {r["id"] for r in b}),
        "shared_texts": sorted(texts(a) & texts(b)),
    }
    counts = {name: len(values) for name, values in shared.items()}
    ctx.report.title = f"Overlap of {left.name} and {right.name}"
    ctx.report.data = {**counts, "left_rows": len(a), "right_rows": len(b)}
    ctx.report.table(
        "What both hold",
        ("what", "count", "first"),
        [(n.replace("_", " "), len(v), v[0] if v else "") for n, v in shared.items()],
    )
    return Report(ctx.out, metrics=counts)


def texts(rows: Sequence[Row]) -> set[str]:
    """What users said, normalised."""
    return {" ".join(m["content"].lower().split()) for row in rows for m in row["messages"] if m["role"] == "user"}
