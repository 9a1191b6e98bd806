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

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_FIELD_VALUES = 12  # of a field that are reported
LANGUAGE_SAMPLES = 2000  # rows whose language is identified


def get_turns(row: Row) -> list[Json]:
    """Return all turns of a row; for a preference pair prompt, chosen, then rejected."""
    return list(row["messages"]) if "messages" in row else [*row["prompt"], *row["chosen"], *row["rejected"]]


def get_question(row: Row) -> str:
    """Return the user turns of a row as text, lowercased, with whitespace collapsed."""
    turns = row["prompt"] if "prompt" in row else [m for m in row["messages"] if m["role"] != "assistant"]
    return " ".join("\n".join(m.get("content") or "" for m in turns if m["role"] != "system").lower().split())


def compute_statistics(rows: Sequence[Row], identify: Callable[[str], tuple[str, float]] | None = None) -> Json:
    """Compute counts and quantiles.

    `identify` returns (code, score) of a text's language; for large datasets only every n-th row is identified.
    """
    lengths: dict[str, list[int]] = {}
    turns: Counter[int] = Counter()
    roles: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    questions: Counter[str] = Counter()
    fields: dict[str, Counter[str]] = {}
    for row in rows:
        messages = get_turns(row)
        turns[len(messages)] += 1
        roles.update(m["role"] for m in messages)
        for m in messages:
            lengths.setdefault(m["role"], []).append(len(m.get("content") or ""))
        whole[hashlib.md5(json.dumps([messages, row.get("tools")], sort_keys=True).encode()).hexdigest()] += 1
        questions[get_question(row)] += 1
        for name, value in get_tags(row).items():
            fields.setdefault(name, Counter())[value] += 1
    every = max(1, len(rows) // LANGUAGE_SAMPLES)
    languages = (
        Counter(identify(_content_text(row))[0] or "none" for row in rows[::every]) if identify else Counter[str]()
    )
    return {
        "rows": len(rows),
        "turns": dict(sorted(turns.items())),
        "roles": dict(roles.most_common()),
        "lengths": {role: quantiles(sizes) for role, sizes in lengths.items()},
        "with_tools": sum(bool(row.get("tools")) for row in rows),
        "with_calls": sum(any(m.get("tool_calls") for m in get_turns(row)) for row in rows),
        "with_system": sum(get_turns(row)[:1] != [] and get_turns(row)[0]["role"] == "system" for row in rows),
        "duplicate_rows": sum(n - 1 for n in whole.values()),
        "duplicate_questions": sum(n - 1 for n in questions.values()),
        "languages": dict(languages.most_common(20)),
        "fields": {
            name: dict(counts.most_common(MAX_FIELD_VALUES))
            for name, counts in fields.items()
            if 1 < len(counts) <= max(MAX_FIELD_VALUES, len(rows) // 10)
        },
    }


def get_tags(row: Row) -> dict[str, str]:
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

    return {f"{share:.0%}": int(np.quantile(np.array(sizes), share)) for share in QUANTILES}


def _content_text(row: Row) -> str:
    return " ".join(str(m.get("content") or "") for m in get_turns(row) if m["role"] != "system")


def find_duplicates(rows: Sequence[Row]) -> tuple[set[str], set[str]]:
    """Return (ids of duplicated rows, ids of rows whose question is duplicated)."""
    whole: dict[str, list[str]] = {}
    questions: dict[str, list[str]] = {}
    for row in rows:
        whole.setdefault(json.dumps([get_turns(row), row.get("tools")], sort_keys=True), []).append(row["id"])
        questions.setdefault(get_question(row), []).append(row["id"])

    def find_duplicated_ids(found: dict[str, list[Any]]) -> set[str]:
        return {id for ids in found.values() if len(ids) > 1 for id in ids}

    return find_duplicated_ids(whole), find_duplicated_ids(questions)
