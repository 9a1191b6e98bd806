"""Process that compares formulas: reads [expected, answer] as JSON lines, writes true or false."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


def parse_formula(text: str) -> Any:
    """Parse a formula, as LaTeX or plain."""
    from math_verify import parse

    text = text.strip().strip("$")
    return parse(f"${text}$", parsing_timeout=None)


def is_equal(expected: str, answer: str) -> bool:
    """Return whether two formulas are equal."""
    from math_verify import verify

    gold = parse_formula(expected)
    return bool(gold) and bool(verify(gold, parse_formula(answer), timeout_seconds=None))


def main() -> None:
    """Answer line by line."""
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        try:
            found = is_equal(*json.loads(line))
        except Exception:  # sympy raises what it likes
            found = False
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
