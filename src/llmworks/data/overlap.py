"""Stage `data.overlap`: count the rows that two chat datasets share, as a gate against evaluating on training data."""

from __future__ import annotations

from collections.abc import Sequence

from llmworks.core.artifact import Config, Dataset, Report
from llmworks.core.context import Context
from llmworks.data.store.rows import Row, read_chat


class OverlapConfig(Config):
    """No options: groups, ids and normalized user messages are compared exactly."""


def overlap(config: OverlapConfig, left: Dataset, right: Dataset, ctx: Context) -> Report:
    """Count the shared groups, ids and user messages of two chat datasets; case and white space are ignored."""
    a, b = read_chat(left), read_chat(right)
    shared = {
        "shared_groups": sorted({r["group"] for r in a} & {r["group"] for r in b}),
        "shared_ids": sorted({r["id"] for r in a} & {r["id"] for r in b}),
        "shared_texts": sorted(get_user_messages(a) & get_user_messages(b)),
    }
    counts = {name: len(values) for name, values in shared.items()}
    ctx.report.title = f"Overlap of {left.name} and {right.name}"
    ctx.report.data = {**counts, "left_rows": len(a), "right_rows": len(b)}
    ctx.report.add_table(
        "Shared by both",
        ("kind", "count", "first"),
        [(n.replace("_", " "), len(v), v[0] if v else "") for n, v in shared.items()],
    )
    return Report(ctx.out, metrics=counts)


def get_user_messages(rows: Sequence[Row]) -> set[str]:
    """Return the normalized user messages."""
    return {" ".join(m["content"].lower().split()) for row in rows for m in row["messages"] if m["role"] == "user"}
