"""Parsers of commands: errors of one line, options that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line. `fields`: config fields, set by --set; `inputs`: inputs of a stage."""

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
