"""Read human labels of answers: rows of {id, label}, with `rater` where several people judged."""

from __future__ import annotations

from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import read_raw_rows
from llmworks.evaluate.statistics.agreement import majority_vote
from llmworks.score.judge import MAX_GRADE


def read_labels(data: Dataset, known: set[str], *, pairs: bool) -> dict[str, Any]:
    """Return by sample a verdict A, B or C, or a grade scaled to 0..1; of several raters the majority, or the mean.

    Errors: DataError for a malformed label, an unknown sample, or two labels of one rater for one sample.
    """
    rejected = RejectedRows()
    labels: dict[str, dict[str, Any]] = {}
    for file, number, row in read_raw_rows(data.path, rejected):
        where = f"{data.name}: {file} row {number}"
        id, rater = str(row.get("id", "")), str(row.get("rater") or "")
        if id not in known:
            raise DataError(f"{where}: the id {id!r} is not a sample of this evaluation")
        if rater in labels.get(id, {}):
            raise DataError(
                f"{where}: {f'{rater!r} labels' if rater else 'there are two labels for'} the sample"
                f" {id!r}{' twice' if rater else ''}; name the `rater` where several people judged"
            )
        labels.setdefault(id, {})[rater] = _parse_label(row.get("label"), where, pairs=pairs)
    if rejected.rows:
        raise DataError(
            f"{data.name}: {len(rejected.rows)} rows cannot be read, the first: {rejected.rows[0]['reason']}"
        )
    if not labels:
        raise DataError(f"{data.name}: has no labels")
    return {
        id: majority_vote(list(votes.values())) if pairs else sum(votes.values()) / len(votes)
        for id, votes in labels.items()
    }


def _parse_label(value: Any, where: str, *, pairs: bool) -> Any:
    if pairs:
        letter = {"TIE": "C"}.get(str(value).strip().upper(), str(value).strip().upper())
        if letter not in ("A", "B", "C"):
            raise DataError(f"{where}: the label {value!r} must be A, B or C (a tie)")
        return letter
    try:
        grade = float(value)
    except (TypeError, ValueError):
        grade = 0.0
    if not 1 <= grade <= MAX_GRADE:
        raise DataError(f"{where}: the label {value!r} is not a grade from 1 to {MAX_GRADE}")
    return (grade - 1) / (MAX_GRADE - 1)
