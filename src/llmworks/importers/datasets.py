"""Build recipe steps for the data of another tool's configuration: read, mix and split datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import UserError
from llmworks.importers.keys import Keys

Steps = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A dataset.

    `shape`: a format of data.chat, or `text` for documents with their text in the field `text`; `rows`: maximum number
    of rows, 0 = all.
    """

    ref: str
    shape: str
    text: str = "text"
    rows: int = 0


def read(sources: Sequence[Source], steps: Steps, prefix: str = "") -> str:
    """Add steps that read all datasets; returns the name of the step that combines them.

    UserError when documents and conversations are mixed.
    """
    names: dict[str, str] = {}
    for number, source in enumerate(sources, 1):
        mark = f"{prefix}{'-' if prefix else ''}{number}" if len(sources) > 1 else prefix
        raw, made = (
            "-".join(filter(None, ("raw", mark))),
            "-".join(filter(None, ("texts" if source.shape == "text" else "chats", mark))),
        )
        steps[raw] = {"use": source.ref}
        if source.shape == "text":
            steps[made] = {
                "stage": "data.read",
                "inputs": {"data": raw},
                **({"config": {"text_field": source.text}} if source.text != "text" else {}),
            }
        else:
            steps[made] = {"stage": "data.chat", "inputs": {"data": raw}, "config": {"format": source.shape}}
        if source.rows and source.shape != "text":
            some = made.replace("chats", "some", 1)
            steps[some] = {
                "stage": "data.mix",
                "inputs": {"data": {"all": made}},
                "config": {"total_rows": source.rows, "max_repeats": 1},
            }
            made = some
        names[f"set-{number}"] = made
    if len({source.shape == "text" for source in sources}) > 1:
        raise UserError(
            "mixes documents and conversations; fine-tuning reads one kind: translate a separate configuration for each"
        )
    if len(sources) == 1:
        return names["set-1"]
    mixed = "-".join(filter(None, ("rows", prefix)))
    steps[mixed] = {"stage": "data.mix", "inputs": {"data": names}}
    return mixed


def split(rows: str, share: float, steps: Steps, keys: Keys, key: str) -> tuple[str, str]:
    """Add the steps of a train/test split; returns their names.

    `share` is the value of `key`: the fraction of held-out rows below 1, else their number.
    """
    if share >= 1:
        keys.otherwise(key, f"{share} rows; here a fraction is held out, and 5% is used")
        share = 0.05
    folds = max(2, round(1 / share))
    if abs(1 / folds - share) > 0.01:
        keys.otherwise(key, f"{share}; one of {folds} folds is held out, {1 / folds:.0%} of the rows")
    for part in ("train", "test"):
        steps[part] = {"stage": "data.split", "inputs": {"data": rows}, "config": {"split": part, "n_splits": folds}}
    return "train", "test"
