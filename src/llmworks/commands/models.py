"""What `chat` and `serve` do with their arguments. All logic is in the rooms below."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmworks.commands.output import workspace_of
from llmworks.core.errors import UserError


def chat(args: argparse.Namespace) -> None:
    """`llmworks chat MODEL`."""
    from llmworks.core.types import Sampling
    from llmworks.generate.chat import Conversation, converse
    from llmworks.runtime.references import open_engine, resolve

    workspace = workspace_of(args)
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    tools = _read_tools(args.tools) if args.tools else ()
    artifact = resolve(args.model, workspace=workspace)
    engine = open_engine(artifact, workspace)
    try:
        converse(Conversation(engine, sampling, args.system, tools), args.message)
    finally:
        engine.close()


def _read_tools(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON list of functions ({error})") from None
    if not isinstance(value, list) or not all(isinstance(t, dict) and "name" in t.get("function", t) for t in value):
        raise UserError(f"{path}: must be a JSON list of functions, each with a name and parameters")
    return tuple(value)


def serve(args: argparse.Namespace) -> None:
    """`llmworks serve MODEL`."""
    from llmworks.runtime.references import open_engine, resolve
    from llmworks.serve.server import check_port, serve_forever

    check_port(args.host, args.port)
    workspace = workspace_of(args)
    artifact = resolve(args.model, workspace=workspace)
    engine = open_engine(artifact, workspace)
    try:
        serve_forever(engine, args.name or artifact.name, args.host, args.port)
    finally:
        engine.close()
