"""The session that a command's arguments describe: workspace, seed, workers, trackers."""

from __future__ import annotations

import argparse
import sys

from llmworks.core.workers import Pool
from llmworks.core.workspace import Workspace, default_workspace
from llmworks.runtime.session import Session


def workspace_of(args: argparse.Namespace) -> Workspace:
    """The workspace that the command works in."""
    return Workspace(args.workspace or default_workspace())


def pool_of(args: argparse.Namespace) -> Pool:
    """Where the parts of a stage run."""
    return Pool(args.workers, args.engine, args.address)


def tell(line: str) -> None:
    """Print a line that is no result."""
    print(line, file=sys.stderr, flush=True)


def session_of(args: argparse.Namespace) -> Session:
    """What makes artifacts for a command; of options that it has not the usual values are taken."""
    return Session(
        workspace_of(args),
        seed=getattr(args, "seed", None) or 0,
        quiet=getattr(args, "quiet", False),
        pool=pool_of(args) if hasattr(args, "workers") else None,
        track=getattr(args, "track", ()),
        say=lambda line: tell(f"  {line}"),
    )
