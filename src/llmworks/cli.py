"""The command line: an argument shell.

Parsers are built only for the command that was typed; nothing heavy is imported for help.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmworks.commands.parsers import COMMANDS, Parser, workers

HELP = """\
llmworks: one workshop for the whole life of a language model

usage: llmworks COMMAND ...

recipes
  run RECIPE          run a recipe; what is up to date is skipped, what was interrupted goes on
  plan RECIPE         what would run, why, and its time, memory and disk
  tune sweep RECIPE SEARCH      the best values of a recipe's fields, by trials
  tune frontier MODEL           its quantizations: sizes, damage, speeds, skills (autoquant; autogguf: GGUF files only)
  tune evolve FILE              the numbers of a merge, by evaluation
  train selftest RECIPE [STEP]   does the configuration of its trainings hold? in seconds, on a shrunken model
  import FILE         a configuration of Axolotl or LLaMA-Factory as a recipe
  stages [NAME]       the stage table, or one stage with its inputs and fields

artifacts
  show ARTIFACT       where an artifact came from and what was measured
  tree [ARTIFACT]     the family tree of the workspace, or of one artifact
  verify ARTIFACT     check its files and its ancestors', derive exact steps again, byte for byte
                      --golden MODEL [ENGINE]: does it, or the engine, read and say what was recorded?
  diff A B            which fields, parents and metrics differ
  gc                  remove what no name and no descendant needs
  assets list|fetch|path   named real models and data

models
  merge FILE          models as one, by mergekit's YAML
  lazymerge --models A B   the YAML, the merge, scores of parents and child, a card
  autoeval MODEL ...  a suite of tasks on models, and the leaderboard of the workspace
  tasks [NAME]        the tasks and suites that models are asked
  arena REPORT ...    vote for the better of two answers, without knowing whose they are
  chat MODEL          talk to a model in the terminal
  serve MODEL         answer the OpenAI API over HTTP

single stages: llmworks GROUP STAGE [--INPUT] REF ... [--config FILE] [--set key=value] --out DIR
{stages}

A MODEL or ARTIFACT is a path, a name in the workspace (quickstart/merged), asset:NAME, hf:ORG/NAME, gguf:FILE,
url:URL#sha256=HEX or http://HOST:PORT/v1#MODEL. `llmworks COMMAND --help` tells more.
Exit codes: 0 done, 1 a check failed, 2 a mistake in what was given, 3 the machine lacks something or a server fails,
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    from llmworks.commands import launch
    from llmworks.core.errors import LlmworksError

    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        signal.signal(signal.SIGTERM, _interrupt)
        if os.environ.get("RANK", "0") != "0":  # of processes that were started together the first tells what was made
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = launch.spread(words)
        return dispatch(words) if code is None else code
    except LlmworksError as error:
        if launch.is_told(error):
            return launch.LOST
        print(f"llmworks: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmworks: interrupted; the same command again goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno in (28, 122):  # no space left, quota
            print(
                f"llmworks: {error.filename or 'the disk'}: no space left; free some (llmworks gc) and run the same"
                " command again",
                file=sys.stderr,
            )
            return 3
        print(f"llmworks: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _interrupt(number: int, frame: object) -> None:
    """A polite kill ends as Ctrl-C does: workers are stopped, drafts removed."""
    raise KeyboardInterrupt


def dispatch(words: list[str]) -> int:
    """Find the command and call it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(stages=_stage_lines()))
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"llmworks {version('llmworks')}")
        return 0
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), "")
    if name and not (name == "merge" and _is_stage(words)):
        parser, words = COMMANDS[name](), words[len(name.split()) - 1 :]
        # options may stand between words; argparse does not allow that together with subcommands
        args = parser.parse_args(words[1:]) if words[0] == "assets" else parser.parse_intermixed_args(words[1:])
        import importlib

        room, _, handler = args.handler.partition(".")
        getattr(importlib.import_module(f"llmworks.commands.{room}"), handler)(args)
        return 0
    return _stage_command(words)


def _is_stage(words: list[str]) -> bool:
    """Whether the first two words name a stage, as `merge adapter` does, beside a command of the first."""
    from llmworks.runtime.stages import STAGES

    return len(words) > 1 and ".".join(words[:2]) in STAGES


def _stage_lines() -> str:
    from llmworks.runtime.stages import STAGES

    return "\n".join(f"  {name.replace('.', ' '):<23} {stage.summary}" for name, stage in sorted(STAGES.items()))


def _stage_command(words: list[str]) -> int:
    """`llmworks GROUP STAGE ...`: the stage named by the first two words, or by the first alone."""
    import difflib

    from llmworks.commands import making
    from llmworks.runtime.config_help import config_help
    from llmworks.runtime.resolve import resolve
    from llmworks.runtime.stages import table

    known = table()
    name, rest = (".".join(words[:2]), words[2:]) if ".".join(words[:2]) in known else (words[0], words[1:])
    if name not in known:
        group = sorted(s for s in known if s.split(".")[0] == words[0])
        if group and words[1:] in ([], ["-h"], ["--help"]):
            lines = "\n".join(f"  {s.replace('.', ' '):<20} {known[s].summary}" for s in group)
            print(
                f"usage: llmworks {words[0]} STAGE [--INPUT] REF ... [--config FILE] [--set key=value] --out"
                f" DIR\n\n{lines}\n\n`llmworks {words[0]} STAGE --help` tells more."
            )
            return 0
        typed = " ".join(words[:2] if group else [w for w in words[:2] if not w.startswith("-")])
        near = difflib.get_close_matches(typed, [s.replace(".", " ") for s in known], n=1, cutoff=0.75)
        if not near and not group:
            typed = words[0]
            near = difflib.get_close_matches(typed, list(COMMANDS), n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"the group has {', '.join(s.replace('.', ' ') for s in group)}"
            if group
            else "see llmworks --help"
        )
        print(f"llmworks: unknown command {typed!r}, {hint}", file=sys.stderr)
        return 2
    stage = resolve(name)
    known_fields = config_help(stage.config)
    wide = max((len(field) for field, _, _ in known_fields), default=0)
    fields = "\n".join(f"  {field:<{wide}} {what} ({kind})" for field, kind, what in known_fields)
    inputs = " ".join(_asked(item) for item in stage.inputs.values())
    parser = Parser(
        prog=f"llmworks {name.replace('.', ' ')}",
        usage=(
            f"%(prog)s {inputs} [--set KEY=VALUE ...]"
            f" {'[--out NAME]' if stage.output.kind == 'report' else '--out NAME'} [other options]"
        ),
        description=stage.help,
        epilog=f"config fields (--set or --config):\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.fields = frozenset(stage.config.model_fields)
    for item in stage.inputs.values():
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=f"input_{item.name}",
            action="append",
            default=[],
            metavar="KEY=REF" if item.shape == "dict" else "REF",
            help=item.describe(),
        )
    parser.add_argument("refs", nargs="*", metavar="REF", help="the inputs in their order, in place of their names")
    parser.add_argument("--config", type=Path, help="YAML file of config fields")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one config field")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="NAME",
        help="name of the result: a link to it in the workspace's store; a report needs none",
    )
    parser.add_argument("--seed", type=int, default=0)
    workers(parser)
    parser.add_argument("--workspace", type=Path, help="default: $LLMWORKS_WORKSPACE, else ./workspace")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    args = parser.parse_intermixed_args(rest)
    args.stage = stage
    free = [
        f"input_{item.name}"
        for item in stage.inputs.values()
        if item.shape == "one" and not getattr(args, f"input_{item.name}")
    ]
    if len(args.refs) > len(free):
        many = next(
            (f"; --{name} is given again for each" for name, item in stage.inputs.items() if item.shape != "one"), ""
        )
        parser.error(
            f"{args.refs[len(free)]!r} is one word too many; inputs:"
            f" {', '.join(f'--{name}' for name in stage.inputs)}{many}"
        )
    for name, ref in zip(free, args.refs, strict=False):
        setattr(args, name, [ref])
    making.stage(args)
    return 0


def _asked(item: Any) -> str:
    """An input in a line of usage: in brackets where it may be left out, with dots where it may be given again."""
    text = (
        f"--{item.name.replace('_', '-')}"
        f" {'KEY=REF' if item.shape == 'dict' else 'REF'}{'' if item.shape == 'one' else ' ...'}"
    )
    return text if item.required else f"[{text}]"


if __name__ == "__main__":
    raise SystemExit(main())
