"""`llmworks autogguf`: `tune frontier` for GGUF files only."""

from __future__ import annotations

from llmworks.commands import tune_frontier
from llmworks.commands.parsers import Parser
from llmworks.commands.tune_frontier import handle

__all__ = ["build_parser", "handle"]


def build_parser() -> Parser:
    """Return the parser of `llmworks autogguf`."""
    return tune_frontier.build_parser("autogguf", methods="gguf-")
