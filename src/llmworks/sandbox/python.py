"""Run a Python program in the sandbox, with llmworks' own interpreter."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from llmworks.sandbox.bubblewrap import Limits, SandboxResult, run

MAIN = "main.py"


def run_python(
    code: str, *, files: Mapping[str, str | bytes] | None = None, stdin: str = "", limits: Limits | None = None
) -> SandboxResult:
    """Run `code` as a program in a directory with `files`.

    It can import the standard library and packages of the base interpreter.
    """
    interpreter = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return run(
        [str(interpreter), "-B", "-E", "-s", MAIN],
        files={**(files or {}), MAIN: code},
        stdin=stdin,
        limits=limits,
        readable_paths=[Path(sys.base_prefix)],
    )
