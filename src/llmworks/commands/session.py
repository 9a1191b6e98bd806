"""Create the session of a command from its arguments: workspace, seed, workers, trackers."""

from __future__ import annotations

import argparse
import sys

from llmworks.core.workers import WorkerPool
from llmworks.core.workspace import Workspace, default_workspace
from llmworks.runtime.session import Session


def get_workspace(args: argparse.Namespace) -> Workspace:
    """Return the command's workspace."""
    return Workspace(args.workspace or default_workspace())


def create_pool(args: argparse.Namespace) -> WorkerPool:
    """Return the worker pool."""
    return WorkerPool(args.workers, args.engine, args.address)


def print_status(line: str) -> None:
    """Print a status line to standard error."""
    print(line, file=sys.stderr, flush=True)


def create_session(args: argparse.Namespace) -> Session:
    """Return the command's session; options that the command does not have keep their defaults."""
    return Session(
        get_workspace(args),
        seed=getattr(args, "seed", None) or 0,
        quiet=getattr(args, "quiet", False),
        pool=create_pool(args) if hasattr(args, "workers") else None,
        track=getattr(args, "track", ()),
        say=lambda line: print_status(f"  {line}"),
    )
