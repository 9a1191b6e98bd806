"""Read multiple-choice chain-of-thought examples in FLAN's format.

`Q: ... (A) ... (B) ... A: Let's think step by step. ... The answer is (C).`

The file is one JSON object of subject -> text with several examples, as in lm-evaluation-harness for MMLU (Hendrycks
et al. 2021; Wei et al. 2022).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from llmworks.core.errors import DataError
from llmworks.core.types import Message, messages_to_json
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.rows import Row

EXAMPLE = re.compile(r"^Q:\s*(.*?)^A:\s*(.*?)(?=^Q:|\Z)", re.MULTILINE | re.DOTALL)
ANSWER = re.compile(r"The answer is \(([A-Z])\)\.?\s*\Z")
OPTION = re.compile(r"\(([A-Z])\)")


def rows(path: Path, rejected: RejectedRows) -> list[Row]:
    """Read chat rows: question with options, reasoning ending in the answer letter.

    The letter is the row's `answer`, the subject its `group`.
    """
    files = [path] if path.is_file() else sorted(path.glob("[!.]*.json"))
    if not files:
        raise DataError(f"{path}: format flan-cot takes a JSON file")
    found: list[Row] = []
    for file in files:
        try:
            subjects = json.loads(file.read_text(encoding="utf-8"))
            assert isinstance(subjects, dict)
            assert all(isinstance(text, str) for text in subjects.values())
        except (ValueError, AssertionError):
            raise DataError(f"{file}: must be a JSON object that maps subjects to strings of examples") from None
        for line, (subject, text) in enumerate(subjects.items(), 1):
            examples = EXAMPLE.findall(text)
            if not examples:
                rejected.add(file.name, line, "no example (lines beginning with Q: and A:)", text)
            for number, (question, answer) in enumerate(examples, 1):
                question, answer = question.strip(), answer.strip()
                letter = ANSWER.search(answer)
                if letter is None or letter[1] not in OPTION.findall(question):
                    rejected.add(
                        file.name, line, "an example's answer is not one of its options", f"Q: {question}\nA: {answer}"
                    )
                    continue
                turns = (Message("user", question), Message("assistant", answer))
                extra = {"fields": {"subject": subject}}
                found.append(
                    {
                        "id": f"{subject}-{number}",
                        "group": subject,
                        "messages": messages_to_json(turns),
                        "tools": [],
                        "answer": f"({letter[1]})",
                        "extra": extra,
                    }
                )
    return found
