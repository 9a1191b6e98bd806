"""Score a Python program with unit tests, in the sandbox."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.errors import DataError
from llmworks.core.types import Message, Score
from llmworks.sandbox import Limits, SandboxResult, run_python
from llmworks.score.extract import extract_code_block

LIMITS = Limits(seconds=10, memory_mb=512)


def code(prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
    """Return 1 when the completion's last Python block passes `answer.tests`, which are appended to it.

    `answer.setup` is prepended. A program that exits before the tests finish has not passed.

    Errors: DataError for a row without tests; MissingDependency without bubblewrap.
    """
    answer = row.get("answer")
    tests = answer.get("tests") if isinstance(answer, Mapping) else None
    if not isinstance(answer, Mapping) or not isinstance(tests, str) or not tests.strip():
        raise DataError(f'row {row.get("id")!r}: `answer` must be {{"tests": PYTHON, "setup": PYTHON}}')
    for name in ("setup", "tests"):
        try:
            ast.parse(str(answer.get(name) or ""))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise DataError(f"row {row.get('id')!r}: answer.{name} is not valid Python ({error})") from None
    program = "\n".join(
        (str(answer.get("setup") or ""), extract_code_block(completion, "python", "py", "python3"), tests)
    )
    through = hashlib.sha256(program.encode("utf-8", "replace")).hexdigest()
    outcome = run_python(f"{program}\nprint('\\n{through}')\n", limits=LIMITS)
    if outcome.ok and outcome.stdout.endswith(f"\n{through}\n"):
        return Score(1.0)
    return Score(0.0, _failure_reason(outcome))


def _failure_reason(outcome: SandboxResult) -> str:
    if outcome.stop_reason != "exit":
        return f"reached the limit of {outcome.stop_reason}"
    last = next((line for line in reversed(outcome.stderr.splitlines()) if line.strip()), "")
    return last[:160] or (
        "exited before the tests finished" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}"
    )
