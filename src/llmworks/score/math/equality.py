"""Mathematical equality of two formulas, by math-verify (sympy) in a process of its own.

sympy can take for ever on a formula of a few characters, and its own timeouts need the main thread: a process that does
not answer is ended, and a new one is started for the next formula.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import subprocess
import sys
import threading
from functools import lru_cache

SECONDS = 5.0
STARTUP_SECONDS = 60.0
MAX_CHARACTERS = 400
FORMULA = re.compile(r"\\[A-Za-z]+|[\^√π∞≤≥≠±∈∪∩]")
OPERATORS = re.compile(r"[+\-*/=^<>,]")
# Digits and operators alone may be a date, a range or a phone number.
VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])|^[(\[{]")
PLAIN = re.compile(r"[\w\s+\-*/^=().,<>\[\]{}|√π∞≤≥≠±∈∪∩\\$%]+")


def is_formula(text: str) -> bool:
    """Return whether a key is mathematical: LaTeX, a mathematical sign, or operators among digits and variables."""
    if len(text) > MAX_CHARACTERS or not PLAIN.fullmatch(text):
        return False
    operators = OPERATORS.search(text) and any(map(str.isdigit, text))
    return bool(FORMULA.search(text) or (operators and VARIABLE.search(text.strip())))


@lru_cache(maxsize=4096)
def is_equal_formula(expected: str, answer: str) -> bool:
    """Return whether math-verify takes an answer for equal to the key; False for what it cannot read in time."""
    if len(answer) > MAX_CHARACTERS:
        return False
    return _WORKER.ask(expected, answer)


class _Worker:
    """A process that compares formulas, one at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None

    def ask(self, expected: str, answer: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            line = self._exchange(json.dumps([expected, answer]), SECONDS)
            if line is None:
                self.stop()
            return line == "true"

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmworks.score.math.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._exchange(json.dumps(["1", "1"]), STARTUP_SECONDS)

    def _exchange(self, line: str, seconds: float) -> str | None:
        """Send a line and return the answer; None if there is none in time."""
        process, found = self.process, list[str]()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        output = process.stdout
        self.reader = threading.Thread(target=lambda: found.append(output.readline()), daemon=True)
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except OSError:
            return None
        self.reader.start()
        self.reader.join(seconds)
        return found[0].strip() if found and found[0] else None

    def stop(self) -> None:
        """End the process."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        if self.reader is not None and self.reader.is_alive():
            self.reader.join(1.0)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process = None


_WORKER = _Worker()
atexit.register(_WORKER.stop)
