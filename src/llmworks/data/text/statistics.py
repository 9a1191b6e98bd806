"""Dataset statistics of conversations or preference pairs: turns, lengths, roles, languages, duplicates, other fields.

Pure functions.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llmworks.core.types import Json
from llmworks.data.store.rows import Row

SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
VALUES = 12  # of a field that are reported
SAMPLED = 2000  # rows whose language is identified


def turns_of(row: Row) -> list[Json]:
    """Return all turns of a row; for a preference pair prompt, chosen, then rejected."""
    return list(row["messages"]) if "messages" in row else [*row["prompt"], *row["chosen"], *row["rejected"]]


def question_of(row: Row) -> str:
    """Return the user turns of a row as text, lowercased, with whitespace collapsed."""
    turns = row["prompt"] if "prompt" in row else [m for m in row["messages"] if m["role"] != "assistant"]
    return " ".join("\n".join(m.get("content") or "" for m in turns if m["role"] != "system").lower().split())


def describe(rows: Sequence[Row], identify: Callable[[str], tuple[str, float]] | None = None) -> Json:
    """Compute counts and quantiles.

    `identify` returns (code, score) of a text's language; for large datasets only every n-th row is identified.
    """
    lengths: dict[str, list[int]] = {}
    turns: Counter[int] = Counter()
    roles: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    fields: dict[str, Counter[str]] = {}
    for row in rows:
        messages = turns_of(row)
        turns[len(messages)] += 1
        roles.update(m["role"] for m in messages)
        for m in messages:
            lengths.setdefault(m["role"], []).append(len(m.get("content") or ""))
        whole[hashlib.md5(json.dumps([messages, row.get("tools")], sort_keys=True).encode()).hexdigest()] += 1
        asked[question_of(row)] += 1
        for name, value in tags(row).items():
            fields.setdefault(name, Counter())[value] += 1
    every = max(1, len(rows) // SAMPLED)
    languages = Counter(identify(_words(row))[0] or "none" for row in rows[::every]) if identify else Counter[str]()
    return {
        "rows": len(rows),
        "turns": dict(sorted(turns.items())),
        "roles": dict(roles.most_common()),
        "lengths": {role: quantiles(sizes) for role, sizes in lengths.items()},
        "with_tools": sum(bool(row.get("tools")) for row in rows),
        "with_calls": sum(any(m.get("tool_calls") for m in turns_of(row)) for row in rows),
        "with_system": sum(turns_of(row)[:1] != [] and turns_of(row)[0]["role"] == "system" for row in rows),
        "same_rows": sum(n - 1 for n in whole.values()),
        "same_questions": sum(n - 1 for n in asked.values()),
        "languages": dict(languages.most_common(20)),
        "fields": {
            name: dict(counts.most_common(VALUES))
            for name, counts in fields.items()
            if 1 < len(counts) <= max(VALUES, len(rows) // 10)
        },
    }


def tags(row: Row) -> dict[str, str]:
    """Return a row's short extra fields outside the schema, by which rows can be grouped."""
    found = {"shape": str(row["extra"]["shape"])} if row.get("extra", {}).get("shape") else {}
    for name, value in (row.get("extra") or {}).get("fields", {}).items():
        if isinstance(value, (str, int, float, bool)) and len(str(value)) <= 60:
            found[name] = str(value)
        elif name == "made_by" and isinstance(value, dict):
            found |= {f"made_by.{key}": str(value[key]) for key in ("stage", "model", "operator", "by") if key in value}
    return found


def quantiles(sizes: Sequence[int]) -> dict[str, int]:
    """Compute quantiles of sizes."""
    import numpy as np

    return {f"{share:.0%}": int(np.quantile(np.array(sizes), share)) for share in SHARES}


def _words(row: Row) -> str:
    return " ".join(str(m.get("content") or "") for m in turns_of(row) if m["role"] != "system")


def repeated(rows: Sequence[Row]) -> tuple[set[str], set[str]]:
    """Return (ids of duplicated rows, ids of rows whose question is duplicated)."""
    whole: dict[str, list[str]] = {}
    asked: dict[str, list[str]] = {}
    for row in rows:
        whole.setdefault(json.dumps([turns_of(row), row.get("tools")], sort_keys=True), []).append(row["id"])
        asked.setdefault(question_of(row), []).append(row["id"])

    def several(found: dict[str, list[Any]]) -> set[str]:
        return {id for ids in found.values() if len(ids) > 1 for id in ids}

    return several(whole), several(asked)
