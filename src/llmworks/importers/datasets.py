"""Build recipe steps for the data of another tool's configuration: read, mix and split datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers.keys import SourceKeys

Steps = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class DatasetSource:
    """A dataset.

    `format`: a format of data.chat, or `text` for documents with their text in the field `text_field`. `max_rows`:
    maximum number of rows, 0 = all.
    """

    ref: str
    format: str
    text_field: str = "text"
    max_rows: int = 0


def add_reading_steps(sources: Sequence[DatasetSource], steps: Steps, prefix: str = "") -> str:
    """Add steps that read all datasets; returns the name of the step that combines them.

    UserError when documents and conversations are mixed.
    """
    names: dict[str, str] = {}
    for number, source in enumerate(sources, 1):
        mark = f"{prefix}{'-' if prefix else ''}{number}" if len(sources) > 1 else prefix
        raw, made = (
            "-".join(filter(None, ("raw", mark))),
            "-".join(filter(None, ("texts" if source.format == "text" else "chats", mark))),
        )
        steps[raw] = {"use": source.ref}
        if source.format == "text":
            steps[made] = {
                "stage": "data.read",
                "inputs": {"data": raw},
                **({"config": {"text_field": source.text_field}} if source.text_field != "text" else {}),
            }
        else:
            steps[made] = {"stage": "data.chat", "inputs": {"data": raw}, "config": {"format": source.format}}
        if source.max_rows and source.format != "text":
            some = made.replace("chats", "some", 1)
            steps[some] = {
                "stage": "data.mix",
                "inputs": {"data": {"all": made}},
                "config": {"total_rows": source.max_rows, "max_repeats": 1},
            }
            made = some
        names[f"set-{number}"] = made
    if len({source.format == "text" for source in sources}) > 1:
        raise UserError(
            "mixes documents and conversations; fine-tuning reads one kind: translate a separate configuration for each"
        )
    if len(sources) == 1:
        return names["set-1"]
    mixed = "-".join(filter(None, ("rows", prefix)))
    steps[mixed] = {"stage": "data.mix", "inputs": {"data": names}}
    return mixed


def add_split_steps(rows: str, test_size: float, steps: Steps, keys: SourceKeys, key: str) -> tuple[str, str]:
    """Add the steps of a train/test split; returns their names.

    `share` is the value of `key`: the fraction of held-out rows below 1, else their number.
    """
    if test_size >= 1:
        keys.note_approximated(key, f"{test_size} rows; here a fraction is held out, and 5% is used")
        test_size = 0.05
    folds = max(2, round(1 / test_size))
    if abs(1 / folds - test_size) > 0.01:
        keys.note_approximated(key, f"{test_size}; one of {folds} folds is held out, {1 / folds:.0%} of the rows")
    for part in ("train", "test"):
        steps[part] = {"stage": "data.split", "inputs": {"data": rows}, "config": {"split": part, "n_splits": folds}}
    return "train", "test"
