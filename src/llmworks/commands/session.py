"""Create the session of a command from its arguments: workspace, seed, workers, trackers."""

from __future__ import annotations

import argparse
import sys

from llmworks.core.workers import Pool
from llmworks.core.workspace import Workspace, default_workspace
from llmworks.runtime.session import Session


def workspace_of(args: argparse.Namespace) -> Workspace:
    """Return the command's workspace."""
    return Workspace(args.workspace or default_workspace())


def pool_of(args: argparse.Namespace) -> Pool:
    """Return the worker pool."""
    return Pool(args.workers, args.engine, args.address)


def tell(line: str) -> None:
    """Print a status line to standard error."""
    print(line, file=sys.stderr, flush=True)


def session_of(args: argparse.Namespace) -> Session:
    """Return the command's session; options that the command does not have keep their defaults."""
    return Session(
        workspace_of(args),
        seed=getattr(args, "seed", None) or 0,
        quiet=getattr(args, "quiet", False),
        pool=pool_of(args) if hasattr(args, "workers") else None,
        track=getattr(args, "track", ()),
        say=lambda line: tell(f"  {line}"),
    )
