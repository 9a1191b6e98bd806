"""Parsers of commands: one-line errors, and options shared by several commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors. `fields`: names that are set by --set."""

    fields: Mapping[str, str] = {}
    inputs: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        flag = next((word.split("=")[0] for word in message.split() if word.startswith("--")), "")
        hint = self._suggest(flag) if flag and message.startswith("unrecognized") else ""
        print(f"{self.prog}: {message} ({hint or f'see {self.prog} --help'})", file=sys.stderr)
        raise SystemExit(2)

    def _suggest(self, flag: str) -> str:
        """Say what an unknown flag means: a config field, an input, or a flag that was renamed."""
        from llmworks.runtime.names import find_field, find_flag, find_input

        name = flag[2:].replace("-", "_")
        if given := find_input(name, self.inputs):
            return f"did you mean --{given.replace('_', '-')}?"
        if field := self.fields.get(name) or find_field(name, self.fields):
            return f"{name} is set with --set {field}=VALUE"
        renamed = find_flag(self.prog.removeprefix("llmworks "), flag)
        return f"did you mean {renamed}?" if renamed else ""


def new_parser(name: str, description: str, *, workspace: bool = True, json: bool = True) -> Parser:
    """Return a command's parser with the common options."""
    parser = Parser(prog=f"llmworks {name}", description=description, allow_abbrev=False)
    if workspace:
        parser.add_argument("--workspace", type=Path, help="default: $LLMWORKS_WORKSPACE, else ./workspace")
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_workers(parser: Parser) -> None:
    """Add the options for workers, processes and trackers."""
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes for stages that work in parts; does not change results",
    )
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where the workers run")
    parser.add_argument("--address", default="", help="address of a Ray cluster; default: start a local one")
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes of a distributed training on this machine; use torchrun for several machines",
    )
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="TOOL",
        help="also send metrics to tensorboard, wandb, mlflow or trackio; does not change results",
    )
