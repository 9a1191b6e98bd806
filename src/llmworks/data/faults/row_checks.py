"""Check rows against one another: duplicates, leaked answers, and preference pairs with length bias."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from llmworks.core.types import Json
from llmworks.data.faults.finding import DatasetFinding, add_finding
from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.template_faults import TrainingFault

MIN_PAIRS, MAX_LONGER_FRACTION = 20, 0.7  # length bias is reported from this many pairs and above this share


MIN_LEAKED_CHARACTERS = 20  # shorter answers may occur in their prompt by chance


OTHER_TURN = re.compile(
    r"\n\s*(?:(?:Human|User|USER|Assistant|System): |### (?:Instruction|Response|Human|Assistant)\b)"
)


def check_rows(rows: Sequence[Row], pairs: bool, findings: dict[str, DatasetFinding]) -> None:
    """Find faults across rows: duplicate conversations, contradicting answers, pairs with identical sides."""
    seen: dict[str, str] = {}
    answers: dict[str, tuple[str, str]] = {}
    for row in rows:
        if pairs and row["chosen"] == row["rejected"]:
            add_finding(
                findings,
                row,
                TrainingFault(
                    "identical-sides",
                    "error",
                    "chosen and rejected are identical",
                    "the pair has no training signal: remove it",
                ),
            )
        turns = row.get("messages") or [*row["prompt"], *row["chosen"]]
        whole = json.dumps([turns, row.get("rejected"), row.get("tools")], sort_keys=True)
        if whole in seen:
            add_finding(
                findings,
                row,
                TrainingFault(
                    "duplicate-row",
                    "warning",
                    "duplicate row",
                    "data.chat with duplicates=drop removes them",
                ),
            )
            continue
        seen[whole] = row["id"]
        prompt, answer = (
            json.dumps([turns[:-1], row.get("tools")], sort_keys=True),
            json.dumps(turns[-1], sort_keys=True),
        )
        if not pairs and answers.setdefault(prompt, (answer, row["id"]))[0] != answer:
            add_finding(
                findings, row, TrainingFault("contradiction", "note", "the same question has different answers", "")
            )


def check_pairs(rows: Sequence[Row], findings: dict[str, DatasetFinding]) -> None:
    """Find faults of preference pairs: contradicting pairs, answers contained in their prompt, length bias."""
    preferred: dict[str, str] = {}
    longer = [row for row in rows if _content_length(row["chosen"]) > _content_length(row["rejected"])]
    for row in rows:
        prompt, good, bad = (
            json.dumps([row[side], row.get("tools")], sort_keys=True) for side in ("prompt", "chosen", "rejected")
        )
        if good != bad and preferred.get(f"{prompt}{bad}{good}"):
            add_finding(
                findings,
                row,
                TrainingFault(
                    "contradictory-pairs",
                    "error",
                    "another pair has the same two answers with the preference reversed",
                    "keep one of the two pairs, or neither",
                ),
            )
        preferred[f"{prompt}{good}{bad}"] = row["id"]
        prompt_text = "\n".join(m["content"] or "" for m in row["prompt"])
        answer = "\n".join(m["content"] or "" for m in row["chosen"]).strip()
        if len(answer) >= MIN_LEAKED_CHARACTERS and answer in prompt_text:
            add_finding(
                findings,
                row,
                TrainingFault(
                    "answer-in-prompt",
                    "warning",
                    "the prompt contains the chosen answer",
                    "the model learns to copy: remove the answer from the prompt",
                ),
            )
    share = len(longer) / max(1, len(rows))
    if len(rows) >= MIN_PAIRS and share > MAX_LONGER_FRACTION:
        ratio = sum(_content_length(row["chosen"]) for row in rows) / max(
            1, sum(_content_length(row["rejected"]) for row in rows)
        )
        finding = TrainingFault(
            "length-bias",
            "warning",
            f"the chosen answer is longer in {share:.0%} of the pairs, {ratio:.1f} times as long on average",
            "the model learns to write longer answers: balance the pairs by length",
        )
        for row in longer:
            add_finding(findings, row, finding)


def _content_length(turns: Sequence[Json]) -> int:
    return sum(len(m.get("content") or "") for m in turns)
