"""Score functions by name: (prompt, completion, row) -> Score. Shared by evaluation, rewards and synthesis."""

from __future__ import annotations

from llmworks.errors import UserError
from llmworks.score.function_call import function_call
from llmworks.types import ScoreFunction

SCORES: dict[str, ScoreFunction] = {"function_call": function_call}


def score_function(name: str) -> ScoreFunction:
    """The score function of that name; UserError when there is none."""
    if name not in SCORES:
        raise UserError(f"unknown score function {name!r}; known: {', '.join(sorted(SCORES))}")
    return SCORES[name]
