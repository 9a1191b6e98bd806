"""Check rows against one another: duplicates, leaked answers, and preference pairs with length bias."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmworks.core.types import Json
from llmworks.data.faults.case import Case, _add
from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.template_faults import Finding

FEWEST, BIASED = 20, 0.7  # length bias is reported from this many pairs and above this share

if TYPE_CHECKING:
    pass


LEAKED = 20  # shorter answers may occur in their prompt by chance


OTHER_TURN = re.compile(
    r"\n\s*(?:(?:Human|User|USER|Assistant|System): |### (?:Instruction|Response|Human|Assistant)\b)"
)


def among(rows: Sequence[Row], pairs: bool, cases: dict[str, Case]) -> None:
    """Find faults across rows: duplicate conversations, contradicting answers, pairs with identical sides."""
    seen: dict[str, str] = {}
    answers: dict[str, tuple[str, str]] = {}
    for row in rows:
        if pairs and row["chosen"] == row["rejected"]:
            _add(
                cases,
                row,
                Finding(
                    "equal-sides",
                    "error",
                    "chosen and rejected are identical",
                    "the pair has no training signal: remove it",
                ),
            )
        turns = row.get("messages") or [*row["prompt"], *row["chosen"]]
        whole = json.dumps([turns, row.get("rejected"), row.get("tools")], sort_keys=True)
        if whole in seen:
            _add(
                cases,
                row,
                Finding(
                    "twice",
                    "warning",
                    "duplicate row",
                    "data.chat with duplicates=drop removes them",
                ),
            )
            continue
        seen[whole] = row["id"]
        asked, said = json.dumps([turns[:-1], row.get("tools")], sort_keys=True), json.dumps(turns[-1], sort_keys=True)
        if not pairs and answers.setdefault(asked, (said, row["id"]))[0] != said:
            _add(cases, row, Finding("contradiction", "note", "the same question has different answers", ""))


def of_pairs(rows: Sequence[Row], cases: dict[str, Case]) -> None:
    """Find faults of preference pairs: contradicting pairs, answers contained in their prompt, length bias."""
    preferred: dict[str, str] = {}
    longer = [row for row in rows if _length(row["chosen"]) > _length(row["rejected"])]
    for row in rows:
        prompt, good, bad = (
            json.dumps([row[side], row.get("tools")], sort_keys=True) for side in ("prompt", "chosen", "rejected")
        )
        if good != bad and preferred.get(f"{prompt}{bad}{good}"):
            _add(
                cases,
                row,
                Finding(
                    "contradictory-pairs",
                    "error",
                    "another pair has the same two answers with the preference reversed",
                    "keep one of the two pairs, or neither",
                ),
            )
        preferred[f"{prompt}{good}{bad}"] = row["id"]
        asked = "\n".join(m["content"] or "" for m in row["prompt"])
        said = "\n".join(m["content"] or "" for m in row["chosen"]).strip()
        if len(said) >= LEAKED and said in asked:
            _add(
                cases,
                row,
                Finding(
                    "answer-in-prompt",
                    "warning",
                    "the prompt contains the chosen answer",
                    "the model learns to copy: remove the answer from the prompt",
                ),
            )
    share = len(longer) / max(1, len(rows))
    if len(rows) >= FEWEST and share > BIASED:
        ratio = sum(_length(row["chosen"]) for row in rows) / max(1, sum(_length(row["rejected"]) for row in rows))
        finding = Finding(
            "length-bias",
            "warning",
            f"the chosen answer is longer in {share:.0%} of the pairs, {ratio:.1f} times as long on average",
            "the model learns to write longer answers: balance the pairs by length",
        )
        for row in longer:
            _add(cases, row, finding)


def _length(turns: Sequence[Json]) -> int:
    return sum(len(m.get("content") or "") for m in turns)
