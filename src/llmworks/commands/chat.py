"""`llmworks chat`: chat with a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session
from llmworks.core.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks chat`."""
    parser = new_parser(
        "chat",
        "Chat with a model: interactively, or a single answer to MESSAGE.",
        json=False,
    )
    parser.add_argument("model")
    parser.add_argument("message", nargs="?", help="print the answer to this message and exit")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of tools (functions) for the prompt")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks chat MODEL`."""
    from llmworks.core.types import Sampling
    from llmworks.generate.chat import ChatSession, run_chat

    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    tools = _read_tools(args.tools) if args.tools else ()
    engine = create_session(args).open_engine(args.model)
    try:
        run_chat(ChatSession(engine, sampling, args.system, tools), args.message)
    finally:
        engine.close()


def _read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON list of functions ({error})") from None
    if not isinstance(value, list) or not all(isinstance(t, dict) and "name" in t.get("function", t) for t in value):
        raise UserError(f"{path}: must be a JSON list of functions, each with a name and parameters")
    return tuple(value)
