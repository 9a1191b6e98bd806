"""`llmworks serve`: serve the OpenAI API over HTTP."""

from __future__ import annotations

import argparse

from llmworks.commands.parsers import Parser, new_parser
from llmworks.commands.session import create_session


def build_parser() -> Parser:
    """Return the parser of `llmworks serve`."""
    parser = new_parser(
        "serve",
        "Serve an OpenAI-compatible API over HTTP: /v1/models, /v1/chat/completions, /health.",
        json=False,
    )
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", default="", help="the model's name in the API; default: the artifact's")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks serve MODEL`."""
    from llmworks.serve.server import check_port, serve_forever

    check_port(args.host, args.port)
    session = create_session(args)
    artifact = session.load(args.model)
    engine = session.open_engine(artifact)
    try:
        serve_forever(engine, args.name or artifact.name, args.host, args.port)
    finally:
        engine.close()
