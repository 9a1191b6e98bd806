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
        flags = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        hints = [self._suggest(flag) for flag in flags] if message.startswith("unrecognized") else []
        hint = "; ".join(filter(None, hints)) or f"see {self.prog} --help"
        print(f"{self.prog}: {message} ({hint})", file=sys.stderr)
        raise SystemExit(2)

    def _suggest(self, flag: str) -> str:
        """Say what an unknown flag means: another spelling, an input, a config field, or a flag that was renamed."""
        from llmworks.runtime.names import find_advice, find_field, find_flag, find_input

        name, command = flag[2:].replace("-", "_"), self.prog.removeprefix("llmworks ")
        own = {option: option for action in self._actions for option in action.option_strings}
        if spelled := own.get(flag.replace("_", "-")):
            return f"did you mean {spelled}?"
        if given := find_input(name, self.inputs):
            return f"did you mean --{given.replace('_', '-')}?"
        if field := self.fields.get(name) or find_field(name, self.fields):
            return f"{name} is set with --set {field}=VALUE"
        if advice := find_advice(command.replace(" ", "."), name):
            return f"{name}: {advice}"
        renamed = find_flag(command, flag)
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
