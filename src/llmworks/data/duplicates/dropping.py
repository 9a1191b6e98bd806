"""Drop duplicate documents: save a plan for each part, write the kept documents, show example pairs.

Shared by the deduplication stages. A plan is a file per part with each dropped row's reason, the document kept instead,
and their similarity.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, iterate_documents
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Document, Json
from llmworks.data.store.parts import PartResults, Span, process_parts

if TYPE_CHECKING:
    from llmworks.data.duplicates.lines import Lines

SHOWN = 12  # pairs in the report
SHOWN_CHARACTERS = 700


@dataclass(frozen=True)
class DuplicateDrop:
    """Reason to drop a row: the kind of duplicate, the row kept instead, and their similarity."""

    reason: str
    kept_row: int
    similarity: float


def save_plan(ctx: Context, parts: Sequence[Span], drops: Mapping[int, DuplicateDrop]) -> Path:
    """Write the rows to drop, part by part; returns the folder."""
    ids = read_ids(parts, {drop.kept_row for drop in drops.values()})
    plan = ctx.scratch / "plan"
    plan.mkdir(exist_ok=True)
    for index, part in enumerate(parts):
        own = {
            row - part.row: (drops[row].reason, ids[drops[row].kept_row], drops[row].similarity)
            for row in range(part.row, part.row + part.rows)
            if row in drops
        }
        (plan / f"{index:06d}.json").write_text(json.dumps(own))
    return plan


def read_plan(plan: Path, index: int) -> dict[str, tuple[str, str, float]]:
    """Read the rows to drop of a part: row index in the part -> (reason, id of the kept document, similarity)."""
    found: dict[str, tuple[str, str, float]] = json.loads((plan / f"{index:06d}.json").read_text())
    return found


def write_kept(ctx: Context, parts: Sequence[Span], plan: Path, lines: Lines | None = None) -> PartResults:
    """Write every part without the rows its plan drops, and combine the parts."""
    done = process_parts(ctx, "write", partial(_write_part, lines, plan), list(enumerate(parts)))
    done.gather(ctx.out)
    return done


def read_ids(parts: Sequence[Span], rows: set[int]) -> dict[int, str]:
    """Read the ids of rows."""
    found: dict[int, str] = {}
    for part in parts:
        if not any(part.row <= row < part.row + part.rows for row in rows):
            continue
        row = part.row
        for table in part.tables(("id",)):
            for id in table["id"].to_pylist():
                if row in rows:
                    found[row] = id
                row += 1
    return found


def _write_part(repeating: Lines | None, plan: Path, unit: tuple[int, Span], folder: Path) -> Json:
    """Write a part without duplicates and repeated lines."""
    import numpy as np

    from llmworks.data.duplicates import lines

    index, part = unit
    drops = read_plan(plan, index)
    repeated = dict(np.load(plan / "lines.npz")) if repeating else {}
    reasons: Counter[str] = Counter()
    taken = row = 0
    shown: Counter[str] = Counter()
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        for table in part.tables():
            gone = {i - row: drops[str(i)] for i in range(row, row + table.num_rows) if str(i) in drops}
            for i, document in zip(gone, iterate_documents(take_rows(table, list(gone))), strict=True):
                reason, kept, similarity = gone[i]
                dropped.add(
                    replace(document, metadata={**document.metadata, "duplicate_of": kept, "similarity": similarity}),
                    reason,
                )
                reasons[reason] += 1
            stay = take_rows(table, [i for i in range(table.num_rows) if i not in gone]) if gone else table
            if repeating is None or not len(repeated["numbers"]):
                writer.add_table(stay)
            else:
                places = [row + i for i in range(table.num_rows) if i not in gone]
                for place, document in zip(places, iterate_documents(stay), strict=True):
                    text, out = lines.remove_repeated_lines(
                        repeating, document.text, part.row + place, repeated["numbers"], repeated["first"]
                    )
                    taken += len(out)
                    shown.update(out)
                    if out and len(text.strip()) < repeating.min_remaining_characters:
                        dropped.add(document, "only repeated lines")
                        reasons["only repeated lines"] += 1
                    else:
                        writer.add(replace(document, text=text.strip()) if out else document)
            row += table.num_rows
    return {
        "kept": writer.documents,
        "characters": writer.characters,
        "dropped": reasons,
        "lines": taken,
        "shown": dict(shown.most_common(200)),
    }


def take_rows(table: Any, rows: list[int]) -> Any:
    """Select rows of a table."""
    import numpy as np

    return table.take(np.array(rows, dtype=np.int64))


def read_row_documents(parts: Sequence[Span], rows: set[int]) -> dict[int, Document]:
    """Read the documents of rows; only parts that hold them are read."""
    found: dict[int, Document] = {}
    for part in parts:
        if not any(part.row <= row < part.row + part.rows for row in rows):
            continue
        row = part.row
        for table in part.tables():
            wanted = [i for i in range(table.num_rows) if row + i in rows]
            for i, document in zip(wanted, iterate_documents(take_rows(table, wanted)), strict=True):
                found[row + i] = document
            row += table.num_rows
    return found


def show_pairs(report: ReportBuilder, parts: Sequence[Span], drops: Mapping[int, DuplicateDrop]) -> None:
    """Show example pairs in the report, from least to most similar, preferring pairs that are not identical."""
    chosen = _pick_spread([(row, drop) for row, drop in drops.items() if drop.similarity < 1] or list(drops.items()))
    texts = read_row_documents(parts, {row for row, _ in chosen} | {drop.kept_row for _, drop in chosen})
    report.add_pairs(
        "Pairs side by side",
        [
            (
                f"{drop.reason}, similarity {drop.similarity:.2f}",
                _label_text("kept", texts[drop.kept_row]),
                _label_text("dropped", texts[row]),
            )
            for row, drop in chosen
        ],
        note=(
            "From least to most similar; differences are marked. A pair below the threshold is linked by other members"
            " of its cluster."
        ),
    )


def _label_text(label: str, document: Document) -> tuple[str, str]:
    return f"{label}: {document.id}", document.text[:SHOWN_CHARACTERS]


def _pick_spread(items: list[tuple[int, DuplicateDrop]]) -> list[tuple[int, DuplicateDrop]]:
    """Pick SHOWN items evenly spaced from least to most similar."""
    ordered = sorted(items, key=lambda item: (item[1].similarity, item[0]))
    if len(ordered) <= SHOWN:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
