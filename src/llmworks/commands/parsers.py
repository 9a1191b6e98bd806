"""Parsers of commands: errors of one line, options that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line. `fields`: names that are given by --set."""

    fields: frozenset[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        """Print one line and leave with exit code 2."""
        field = next(
            (
                word[2:].split("=")[0].replace("-", "_")
                for word in message.split()
                if word.startswith("--") and word[2:].split("=")[0].replace("-", "_") in self.fields
            ),
            "",
        )
        hint = (
            f"{field} is set with --set {field}=VALUE"
            if field and message.startswith("unrecognized")
            else f"see {self.prog} --help"
        )
        print(f"{self.prog}: {message} ({hint})", file=sys.stderr)
        raise SystemExit(2)


def new_parser(name: str, what: str, *, workspace: bool = True, json: bool = True) -> Parser:
    """A command's parser, with the options that most commands have."""
    parser = Parser(prog=f"llmworks {name}", description=what, allow_abbrev=False)
    if workspace:
        parser.add_argument("--workspace", type=Path, help="default: $LLMWORKS_WORKSPACE, else ./workspace")
    if json:
        parser.add_argument("--json", action="store_true", help="print the result for programs")
    return parser


def add_workers(parser: Parser) -> None:
    """Options that say where work runs."""
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes for stages that work in parts; changes no result"
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the workers run")
    parser.add_argument("--address", default="", help="a Ray cluster's address; default: one started here")
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes that train together, on this machine; on several take torchrun",
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="TOOL",
        help="also send metrics to tensorboard, wandb, mlflow or trackio; changes no result",
    )
