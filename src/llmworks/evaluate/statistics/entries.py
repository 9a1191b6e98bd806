"""Read evaluations as entries of a leaderboard; two are in one column where task, prompts and rows are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Report
from llmworks.evaluate.statistics.read_evaluation import ALL_FIELDS, read_evaluation


@dataclass(frozen=True)
class LeaderboardEntry:
    """One evaluation: its model, leaderboard column and data."""

    model: str
    name: str
    column: str
    finished: str
    data: Mapping[str, Any]

    @property
    def score(self) -> tuple[float, float, float]:
        """Score and its 95% interval."""
        found = self.data["intervals"][self.data["metric"]]
        return float(found["value"]), float(found["low"]), float(found["high"])


def read_entry(report: Report) -> LeaderboardEntry:
    """Read one evaluation as an entry. DataError where the report is not one."""
    data = read_evaluation(report, *ALL_FIELDS, of_samples=("question", "group", "score"))
    return LeaderboardEntry(
        str(report.about.get("model", "")),
        str(data["model"]),
        get_column_key(data),
        report.manifest.finished if report.manifest else "",
        data,
    )


def get_column_key(data: Mapping[str, Any]) -> str:
    """Return a column key: the task and a hash of definition and samples; any difference gives another key."""
    definition = {k: v for k, v in data["definition"].items() if k not in ("what", "data", "examples", "format")}
    setup = [definition, sorted((s["id"], s.get("row", "")) for s in data["samples"])]
    return f"{data['task']} #{hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()[:4]}"


def keep_latest(entries: Sequence[LeaderboardEntry]) -> list[LeaderboardEntry]:
    """Keep the latest evaluation of each model and column; shorten the column names."""
    found = {(e.model, e.column): e for e in sorted(entries, key=lambda e: e.finished)}
    labels = shorten_column_names({e.column: e.data for e in found.values()})
    return [
        LeaderboardEntry(e.model, e.name, labels[e.column], e.finished, e.data)
        for e in sorted(found.values(), key=lambda e: (e.column, e.model))
    ]


def shorten_column_names(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name every column: the task, plus what distinguishes it from other columns of the same task."""
    out: dict[str, str] = {}
    for task in {c.split(" #")[0] for c in columns}:
        alike = {
            c: [
                f"{d['shots']} shots",
                f"{len(d['samples'])} rows",
                str(d["protocol"].get("prompt", "")),
                str(d["protocol"].get("side", "all")),
            ]
            for c, d in columns.items()
            if c.split(" #")[0] == task
        }
        differing = [i for i in range(4) if len({facts[i] for facts in alike.values()}) > 1]
        named = {
            c: f"{task} ({', '.join(facts[i] for i in differing)})" if differing else task for c, facts in alike.items()
        }
        out |= {c: label if list(named.values()).count(label) == 1 else c for c, label in named.items()}
    return out
