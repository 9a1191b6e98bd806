"""Verifiable instructions, such as word counts, no commas, JSON only: IFEval and IFBench.

IFEval (Zhou et al. 2023, arXiv:2311.07911) and IFBench (Pyatkin et al. 2025, arXiv:2507.02833), by their instruction
ids and arguments.

Verdicts agree with the published checkers on the cases in the tests, except where those use NLP models: sentences and
languages are detected by simpler means here. Some IFBench instructions need word lists or taggers and are not
supported (`UNCHECKED`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.score.constraints.ifbench import IFBENCH
from llmworks.score.constraints.ifeval import IFEVAL

Check = Callable[[str, Mapping[str, Any]], bool]
CHECKS: dict[str, Check] = {**IFEVAL, **IFBENCH}
UNSUPPORTED = (
    "ratio:stop_words",
    "words:odd_even_syllables",
    "words:start_verb",
    "format:emoji",
    "custom:mcq_count_length",
    "custom:reverse_newline",
)


def check_instructions(answer: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return whether an answer follows each instruction; an empty answer follows none."""
    return [bool(answer.strip()) and CHECKS[name](answer, given) for name, given in zip(names, arguments, strict=True)]


def get_instructions(row: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return (names, arguments) of a row's instructions: `answer.constraints` and `answer.arguments`.

    Errors: DataError for unknown ones.
    """
    answer = row.get("answer")
    names = answer.get("constraints") if isinstance(answer, Mapping) else None
    arguments = answer.get("arguments") if isinstance(answer, Mapping) else None
    if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise DataError(
            f'row {row.get("id")!r}: `answer` must be {{"constraints": [NAME, ...], "arguments": [{{...}}, ...]}}'
        )
    unknown = next((name for name in names if name not in CHECKS), None)
    if unknown is not None:
        why = "is not supported" if unknown in UNSUPPORTED else "is unknown"
        raise DataError(f"row {row.get('id')!r}: the instruction {unknown!r} {why}")
    return names, [{k: v for k, v in (given or {}).items() if v is not None} for given in arguments]


def constraints_strict(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when every instruction is followed (prompt-level strict accuracy)."""
    names, arguments = get_instructions(row)
    return _score_all(names, check_instructions(completion, names, arguments))


def constraints_loose(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when every instruction is followed by some variant (prompt-level loose accuracy).

    Variants: with or without the first line, the last line and asterisks.
    """
    names, arguments = get_instructions(row)
    lines = completion.split("\n")
    forms = [completion, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    verdicts = [
        check_instructions(form, names, arguments) for form in (*forms, *(form.replace("*", "") for form in forms))
    ]
    return _score_all(names, [any(column) for column in zip(*verdicts, strict=True)])


def constraints_share(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return the share of followed instructions (instruction-level strict accuracy)."""
    names, arguments = get_instructions(row)
    found = check_instructions(completion, names, arguments)
    return Score(sum(found) / len(found), _score_all(names, found).reason)


def _score_all(names: Sequence[str], found: Sequence[bool]) -> Score:
    missed = [name for name, good in zip(names, found, strict=True) if not good]
    return Score(0.0, f"not followed: {', '.join(missed)}") if missed else Score(1.0)
