"""Stage `data.mix`: mix several datasets into one by weights, with a cap on repetitions, in a seeded order.

Documents are distributed to buckets by a hash and each bucket is shuffled on its own, so memory holds one bucket, not
the mixture.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import COPY_OF, DocumentWriter, iterate_documents, read_tables
from llmworks.core.errors import UserError
from llmworks.core.types import Document, Json
from llmworks.data.card import finish_dataset, finish_rows
from llmworks.data.store.parts import Span, plan_spans, process_parts
from llmworks.data.store.rows import KIND_NAMES, Row, detect_schema, read_chat, read_preference

if TYPE_CHECKING:
    from llmworks.data.text.hashing import Array

BUCKET_CHARACTERS = 32 << 20


class MixConfig(Config):
    """Weight of each input, and the size of the mixture."""

    weights: dict[str, float] = Field(
        default_factory=dict,
        description="mixture weight by input name, on any scale; empty: all rows of every input, once",
    )
    total_characters: int = Field(
        0, ge=0, description="size of a mixture of documents, in characters; 0: the total of the inputs"
    )
    total_rows: int = Field(
        0,
        ge=0,
        description="size of a mixture of conversations or preference pairs, in rows; 0: the total of the inputs",
    )
    max_repeats: float = Field(
        4.0,
        gt=0,
        description="maximum repetitions of a document; above 4 epochs returns diminish (Muennighoff et al. 2023)",
    )
    source_field: str = Field("mix", description="metadata field that receives the input's name")
    seed: int = Field(0, description="seed of the sampling and the order")


@dataclass(frozen=True)
class MixtureShare:
    """Sampling of one input.

    Each document is repeated int(`repeats`) times; those whose random number is below `limit` once more, for the
    fractional part.
    """

    name: str
    available: int
    target: int
    repeats: float
    limit: float = 0.0


def mix(config: MixConfig, data: dict[str, Dataset], ctx: Context) -> Dataset:
    """Mix datasets of documents, of conversations, or of preference pairs.

    Ids become `name/id`; repeated rows get `name/id~2`, `name/id~3` ... Weights are fractions of the characters of
    documents, and of the rows of conversations and pairs.

    Errors: UserError for weights of an unknown input, negative or all-zero weights, and inputs of different schemas.
    """
    kinds = {name: detect_schema(dataset) for name, dataset in data.items()}
    if config.weights and (absent := [name for name in data if name not in config.weights]):
        ctx.progress.log(f"{', '.join(absent)}: no weight given, so nothing is sampled")
    if any(kinds.values()):
        return _mix_rows(config, data, kinds, ctx)
    if config.total_rows:
        raise UserError(
            "total_rows is for conversations and preference pairs; use total_characters for a mixture of documents"
        )
    drawn = {name: _draw_documents(config.seed, name, dataset) for name, dataset in data.items()}
    sizes = {name: int(lengths.sum()) for name, (_, lengths) in drawn.items()}
    shares = [replace(share, limit=_find_limit(share, *drawn[share.name])) for share in plan_shares(config, sizes)]
    total = sum(int(share.available * share.repeats) for share in shares)
    buckets = max(1, math.ceil(total / BUCKET_CHARACTERS))
    units = [
        (share, span)
        for share, dataset in zip(shares, data.values(), strict=True)
        for span in plan_spans(dataset)
        if share.repeats > 0
    ]
    dealt = process_parts(ctx, "deal", partial(_distribute_part, config, buckets), units)
    done = process_parts(ctx, "shuffle", partial(_shuffle_bucket, config.seed, dealt.folders), list(range(buckets)))
    done.gather(ctx.out)
    taken = dealt.sum_counters("characters")
    rows = _build_report_rows(shares, taken, config, ctx)
    report = ctx.report
    report.title = "Mixture of " + ", ".join(data)
    report.subtitle = f"{dealt.sum_values('documents'):,} documents, {sum(taken.values()):,} characters."
    report.data = {row[0]: {"available": row[1], "taken": row[2], "repeats": row[5]} for row in rows}
    report.add_table(
        "Shares",
        ("input", "available characters", "sampled characters", "share", "target share", "epochs"),
        rows,
        note=f"No document is used more than {'once' if config.max_repeats == 1 else f'{config.max_repeats:g} times'}.",
    )
    note = ", ".join(f"{row[0]} {row[3]} (×{row[5]:g})" for row in rows)
    return finish_dataset(
        ctx,
        "data.mix",
        list(data.values()),
        metrics={f"share_{r[0]}": round(r[2] / max(1, sum(taken.values())), 4) for r in rows},
        note=note,
    )


def _build_report_rows(
    shares: list[MixtureShare], taken: Counter[str], config: MixConfig, ctx: Context
) -> list[tuple[str, int, int, str, str, float]]:
    """Return a report row for each input; log the inputs that are smaller than their target."""
    rows = []
    for share in shares:
        got = taken[share.name]
        rows.append(
            (
                share.name,
                share.available,
                got,
                f"{got / max(1, sum(taken.values())):.1%}",
                f"{share.target / max(1, sum(s.target for s in shares)):.1%}",
                round(share.repeats, 3),
            )
        )
        if share.target > 1.01 * share.available * config.max_repeats:
            ctx.progress.log(
                f"{share.name}: the target is {share.target:,} characters, but {config.max_repeats:g} repetitions give"
                f" only {int(share.available * config.max_repeats):,}"
            )
    return rows


def _mix_rows(config: MixConfig, data: dict[str, Dataset], kinds: Mapping[str, str], ctx: Context) -> Dataset:
    if len(set(kinds.values())) > 1:
        raise UserError(
            "only datasets of one schema can be mixed: "
            + ", ".join(f"{name} holds {KIND_NAMES.get(kind, 'documents')}" for name, kind in kinds.items())
        )
    if config.total_characters:
        raise UserError("total_characters is for documents; use total_rows for a mixture of conversations or pairs")
    read = read_preference if "preference" in kinds.values() else read_chat
    every = {name: read(dataset) for name, dataset in data.items()}
    shares = plan_shares(config, {name: len(rows) for name, rows in every.items()}, config.total_rows)
    found: list[Row] = []
    table = []
    for share in shares:
        rows, before = every[share.name], len(found)
        wanted = round(share.repeats * len(rows))
        order = sorted(rows, key=lambda row: draw_uniform(config.seed, "rest", share.name, row["id"]))
        for number in range(wanted):
            row, turn = order[number % len(rows)], number // len(rows)
            fields = {**row["extra"].get("fields", {}), config.source_field: share.name}
            found.append(
                {
                    **row,
                    "id": f"{share.name}/{row['id']}" + (f"~{turn + 1}" if turn else ""),
                    "group": f"{share.name}/{row['group']}",
                    "extra": {**row["extra"], "fields": fields},
                }
            )
        table.append((share.name, len(rows), len(found) - before, round(share.repeats, 3)))
        if share.target > 1.01 * share.available * config.max_repeats:
            ctx.progress.log(
                f"{share.name}: the target is {share.target:,} rows, but {config.max_repeats:g} repetitions give"
                f" only {int(share.available * config.max_repeats):,}"
            )
    if not found:
        raise UserError("the mixture is empty; raise weights or total_rows")
    found.sort(key=lambda row: (draw_uniform(config.seed, "order", row["id"]), row["id"]))
    report = ctx.report
    report.title = "Mixture of " + ", ".join(data)
    report.subtitle = f"{len(found):,} rows."
    report.data = {
        name: {"available": available, "taken": taken, "repeats": repeats} for name, available, taken, repeats in table
    }
    report.add_table("Shares", ("input", "available rows", "sampled rows", "epochs"), table)
    note = ", ".join(f"{name} {taken:,} (×{repeats:g})" for name, _, taken, repeats in table)
    return finish_rows(
        ctx,
        "data.mix",
        list(data.values()),
        found,
        metrics={f"share_{name}": round(taken / len(found), 4) for name, _, taken, _ in table},
        note=note,
    )


def plan_shares(config: MixConfig, sizes: Mapping[str, int], total: int = 0) -> list[MixtureShare]:
    """Compute how often the documents of each input are repeated, in the inputs' order."""
    unknown = sorted(set(config.weights) - set(sizes))
    if unknown:
        raise UserError(f"weights: unknown input {unknown[0]!r}; the inputs are {', '.join(sizes)}")
    weights = (
        {name: config.weights.get(name, 0.0) for name in sizes}
        if config.weights
        else {name: float(size) for name, size in sizes.items()}
    )
    if min(weights.values()) < 0 or not sum(weights.values()) > 0:
        raise UserError("weights: must not be negative, and not all zero")
    total = total or config.total_characters or sum(sizes.values())
    shares = []
    for name, size in sizes.items():
        wanted = int(total * weights[name] / sum(weights.values()))
        shares.append(MixtureShare(name, size, wanted, min(config.max_repeats, wanted / size) if size else 0.0))
    return shares


def _draw_documents(seed: int, name: str, dataset: Dataset) -> tuple[Array, Array]:
    """Return (a random number for each document, its length in characters)."""
    import numpy as np
    import pyarrow.compute as pc

    drawn: list[Array] = []
    lengths: list[Array] = []
    for span in plan_spans(dataset):
        for table in span.tables(("id", "text")):
            drawn.append(np.array([draw_uniform(seed, "rest", name, id) for id in table["id"].to_pylist()]))
            lengths.append(pc.utf8_length(table["text"]).to_numpy())
    return np.concatenate(drawn), np.concatenate(lengths)


def _find_limit(share: MixtureShare, drawn: Array, lengths: Array) -> float:
    """Return the random number below which documents add up to the fractional part of the repetitions."""
    import numpy as np

    rest = (share.repeats - int(share.repeats)) * share.available
    order = np.argsort(drawn, kind="stable")
    reached = int(np.searchsorted(np.cumsum(lengths[order]), rest))
    return float(drawn[order[reached]]) if rest > 0 and reached < len(drawn) else 0.0


def draw_uniform(seed: int, *words: str) -> float:
    """Return a pseudorandom number in [0, 1) that depends only on the seed and the words."""
    return int.from_bytes(hashlib.blake2b("\0".join((str(seed), *words)).encode(), digest_size=7).digest()) / 2**56


def repeat_document(config: MixConfig, share: MixtureShare, document: Document) -> Iterator[Document]:
    """Yield the copies of a document that go into the mixture."""
    whole = int(share.repeats)
    count = whole + (draw_uniform(config.seed, "rest", share.name, document.id) < share.limit)
    marked = {**document.metadata, config.source_field: share.name}
    first = f"{share.name}/{document.id}"
    for number in range(1, count + 1):
        yield replace(
            document,
            id=first + (f"~{number}" if number > 1 else ""),
            metadata={**marked, **({COPY_OF: first} if number > 1 else {})},
        )


def _distribute_part(config: MixConfig, buckets: int, unit: tuple[MixtureShare, Span], folder: Path) -> Json:
    share, span = unit
    characters = documents = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(DocumentWriter(folder / f"{i:05d}", group_bytes=max(1 << 18, (32 << 20) // buckets)))
            for i in range(buckets)
        ]
        for document in span.documents():
            for copy in repeat_document(config, share, document):
                writers[int(draw_uniform(config.seed, "bucket", copy.id) * buckets)].add(copy)
                characters += len(copy.text)
                documents += 1
    return {"characters": {share.name: characters}, "documents": documents}


def _shuffle_bucket(seed: int, distributed: list[Path], bucket: int, folder: Path) -> Json:
    found = [
        document
        for part in distributed
        for file in sorted((part / f"{bucket:05d}").glob("*.parquet"))
        for table in read_tables(file)
        for document in iterate_documents(table)
    ]
    found.sort(key=lambda document: (draw_uniform(seed, "order", document.id), document.id))
    with DocumentWriter(folder) as writer:
        for document in found:
            writer.add(document)
    return {"documents": len(found)}
