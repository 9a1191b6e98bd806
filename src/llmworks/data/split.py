"""Stage `data.split`: select the train or test side of a seeded k-fold split; rows of one group stay on one side.

Conversations are split in memory; documents in parts, with only the group names in memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import COPY_OF, DocumentWriter
from llmworks.core.errors import DataError, UserError
from llmworks.core.types import Document, Json
from llmworks.data.card import finish_dataset, finish_rows
from llmworks.data.store.parts import Span, plan_spans, process_parts
from llmworks.data.store.rows import Row, detect_schema, read_chat, read_preference


class SplitConfig(Config):
    """Side and fold of the split. Two steps that differ only in `split` give the two sides."""

    split: Literal["train", "test"] = Field(description="side to keep")
    n_splits: int = Field(5, ge=2, description="number of folds; one of them is the test side")
    fold: int = Field(0, ge=0, description="index of the test fold")
    seed: int = Field(0, description="seed of the shuffle of groups")
    group_by: str = Field(
        "",
        description=(
            "source or a metadata field whose rows stay on one side; default: the group of a conversation, each"
            " document alone"
        ),
    )
    stratify_by: str = Field(
        "",
        description=(
            "source or a metadata field whose values have equal shares in every fold (stratification); a group takes"
            " the value of its first document"
        ),
    )

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold >= self.n_splits:
            raise ValueError(f"fold is {self.fold}, n_splits is {self.n_splits}: fold must be smaller")
        return self


def split(config: SplitConfig, data: Dataset, ctx: Context) -> Dataset:
    """Keep the conversations, preference pairs or documents of one side, in their order.

    Groups, not rows, are assigned to the folds.

    Errors: DataError when the side would be empty.
    """
    kind = detect_schema(data)
    if not kind and any(data.path.glob("*.parquet")):
        return _split_documents(config, data, ctx)
    if config.group_by or config.stratify_by:
        raise UserError(
            "group_by and stratify_by are for documents; conversations and pairs are always split by their group"
        )
    rows = read_preference(data) if kind == "preference" else read_chat(data)
    test_side_groups = select_test_groups([row["group"] for row in rows], config)
    selected_rows = [row for row in rows if (row["group"] in test_side_groups) == (config.split == "test")]
    if not selected_rows:
        raise DataError(
            f"{data.name}: the {config.split} side of {config.n_splits} folds is empty;"
            f" {len({r['group'] for r in rows})}"
            " groups are too few"
        )
    groups = len(_get_groups(selected_rows))
    note = (
        f"{config.split} side of fold {config.fold} of {config.n_splits}, {groups:,} of"
        f" {len(_get_groups(rows)):,} groups"
    )
    return finish_rows(ctx, "data.split", [data], selected_rows, metrics={"groups": groups}, note=note)


def select_test_groups(groups: Sequence[str], config: SplitConfig) -> set[str]:
    """Return the groups of the test fold.

    Sorted names are shuffled by the seed and assigned round-robin, so fold sizes differ by at most one.
    """
    names = sorted(set(groups))
    random.Random(config.seed).shuffle(names)
    return set(names[config.fold :: config.n_splits])


def _split_documents(config: SplitConfig, data: Dataset, ctx: Context) -> Dataset:
    parts = plan_spans(data)
    strata: dict[str, str] = {}  # group -> stratum
    for part in parts:
        for document in part.documents():
            strata.setdefault(
                get_value(document, config.group_by or "id"),
                get_value(document, config.stratify_by) if config.stratify_by else "",
            )
    held_out: set[str] = set()
    first = config.fold
    for stratum in sorted(set(strata.values())):
        names = sorted(group for group, own in strata.items() if own == stratum)
        random.Random(f"{config.seed}/{stratum}").shuffle(names)
        held_out.update(names[first :: config.n_splits])
        first = (first - len(names)) % config.n_splits  # strata begin at different folds, so that fold sizes stay equal
    side = ctx.scratch / "test-groups.json"
    side.write_text(json.dumps(sorted(held_out)))
    done = process_parts(ctx, "split", partial(_split_part, config, side), parts)
    kept = done.sum_values("documents")
    if not kept:
        raise DataError(
            f"{data.name}: the {config.split} side of {config.n_splits} folds is empty; {len(strata)} groups are"
            " too few"
        )
    done.gather(ctx.out)
    groups = len(held_out) if config.split == "test" else len(strata) - len(held_out)
    note = f"{config.split} side of fold {config.fold} of {config.n_splits}, {groups:,} of {len(strata):,} groups"
    return finish_dataset(ctx, "data.split", [data], metrics={"groups": groups}, note=note)


def _split_part(config: SplitConfig, side: Path, part: Span, folder: Path) -> Json:
    held_out = set(json.loads(side.read_text()))
    with DocumentWriter(folder) as writer:
        for document in part.documents():
            if (get_value(document, config.group_by or "id") in held_out) == (config.split == "test"):
                writer.add(document)
    return {"documents": writer.documents}


def get_value(document: Document, field: str) -> str:
    """Return a document's id, source or metadata field; DataError when it has no such field."""
    if field == "id":  # a copy stays with its original
        return str(document.metadata.get(COPY_OF, document.id))
    if field == "source":
        return document.source
    if field not in document.metadata:
        raise DataError(
            f"document {document.id!r} has no {field!r} in its metadata (it has"
            f" {', '.join(document.metadata) or 'none'})"
        )
    return str(document.metadata[field])


def _get_groups(rows: Sequence[Row]) -> set[str]:
    return {row["group"] for row in rows}
