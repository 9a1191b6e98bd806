"""`llmworks autoquant`: alias of `tune frontier`."""

from __future__ import annotations

from llmworks.commands import tune_frontier
from llmworks.commands.parsers import Parser
from llmworks.commands.tune_frontier import handle

__all__ = ["build_parser", "handle"]


def build_parser() -> Parser:
    """Return the parser of `llmworks autoquant`."""
    return tune_frontier.build_parser("autoquant")
