"""`llmworks GROUP STAGE`: run a single stage outside a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.commands.output import print_json, print_stage_result, relative_path, stage_result_to_json
from llmworks.commands.parsers import Parser, add_workers
from llmworks.commands.session import create_session, print_status
from llmworks.core.errors import GateFailed, UserError

if TYPE_CHECKING:
    from llmworks.runtime.resolve import ResolvedStage, StageInput
    from llmworks.runtime.session import Session


def build_parser(stage: ResolvedStage) -> Parser:
    """Return a stage's parser: inputs by name, fields by --set and --config."""
    from llmworks.runtime.config.help import config_help

    known_fields = config_help(stage.config)
    wide = max((len(field) for field, _, _ in known_fields), default=0)
    fields = "\n".join(f"  {field:<{wide}} {what} ({kind})" for field, kind, what in known_fields)
    inputs = " ".join(_format_usage(item) for item in stage.inputs.values())
    made = Parser(
        prog=f"llmworks {stage.name.replace('.', ' ')}",
        usage=(
            f"%(prog)s {inputs} [--set KEY=VALUE ...]"
            f" {'[--out NAME]' if stage.output.kind == 'report' else '--out NAME'} [other options]"
        ),
        description=stage.help,
        epilog=f"config fields (--set or --config):\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.fields = {name.rpartition(".")[2]: name for name, _, _ in reversed(known_fields)}
    made.inputs = tuple(stage.inputs)
    for item in stage.inputs.values():
        made.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=f"input_{item.name}",
            action="append",
            default=[],
            metavar="KEY=REF" if item.shape == "dict" else "REF",
            help=item.describe(),
        )
    made.add_argument("refs", nargs="*", metavar="REF", help="inputs in order, instead of by name")
    made.add_argument("--config", type=Path, help="YAML file of config fields")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one config field")
    made.add_argument(
        "--out",
        type=Path,
        metavar="NAME",
        help="link to the result to create; optional for a report",
    )
    made.add_argument("--seed", type=int, default=0)
    add_workers(made)
    made.add_argument("--workspace", type=Path, help="default: $LLMWORKS_WORKSPACE, else ./workspace")
    made.add_argument("--quiet", action="store_true", help="show no progress")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _format_usage(item: StageInput) -> str:
    """Return an input's usage: in brackets if optional, with dots if repeatable."""
    text = (
        f"--{item.name.replace('_', '-')}"
        f" {'KEY=REF' if item.shape == 'dict' else 'REF'}{'' if item.shape == 'one' else ' ...'}"
    )
    return text if item.required else f"[{text}]"


def parse(stage: ResolvedStage, words: list[str]) -> argparse.Namespace:
    """Parse a stage's arguments; positional references are its inputs in order."""
    made = build_parser(stage)
    args = made.parse_intermixed_args(words)
    free = [
        f"input_{item.name}"
        for item in stage.inputs.values()
        if item.shape == "one" and not getattr(args, f"input_{item.name}")
    ]
    if len(args.refs) > len(free):
        many = next((f"; repeat --{name} for each" for name, item in stage.inputs.items() if item.shape != "one"), "")
        made.error(
            f"unexpected argument {args.refs[len(free)]!r}; inputs:"
            f" {', '.join(f'--{name}' for name in stage.inputs)}{many}"
        )
    for name, ref in zip(free, args.refs, strict=False):
        setattr(args, name, [ref])
    return args


def handle(stage: ResolvedStage, args: argparse.Namespace) -> None:
    """`llmworks GROUP STAGE --INPUT REF ... --out NAME`."""
    from llmworks.core.workspace import check_out
    from llmworks.runtime.session import check_inputs, validate

    session = create_session(args)
    config = validate(stage, _read_fields(args))
    given = session.add_default_inputs(stage, config, _load_inputs(stage, args, session))
    check_inputs(stage, given)
    if args.out is not None:
        check_out(args.out)
    elif stage.output.kind != "report":
        raise UserError("--out is missing: the name of the result")
    outcome = session.run_stage(stage, config, given)
    if args.out is not None:
        before = session.workspace.link_out(args.out, outcome.artifact)
        if before is not None and before.kind != outcome.artifact.kind:
            print_status(
                f"  {args.out} linked to a {before.kind} before, which still exists: {relative_path(before.path)}"
            )
    if args.json:
        print_json(stage_result_to_json(outcome))
    else:
        print_stage_result(stage.name, args.out, outcome)
    failed = str(outcome.artifact.about.get("failed", ""))
    if failed:
        raise GateFailed(failed)


def _read_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config fields of --config, overridden by --set. UserError for invalid values."""
    import yaml

    from llmworks.core.text.yaml import load_yaml
    from llmworks.runtime.config.overrides import assign

    values: dict[str, Any] = {}
    if args.config:
        try:
            values = load_yaml(args.config.read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise UserError(f"{args.config}: no such file; --config takes a YAML file of config fields") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{args.config}:{line}: not YAML: {error.problem}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{args.config}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{args.config}: must be a mapping of config fields")
    for override in args.set:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: write it as key=value")
        assign(values, name.split("."), text)
    return values


def _load_inputs(stage: ResolvedStage, args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Return the artifacts behind the given references, by input.

    UserError for one of the wrong kind, without a name, or too many.
    """
    from llmworks.runtime.session import check_kind

    given: dict[str, Any] = {}
    for name, wanted in stage.inputs.items():
        refs = getattr(args, f"input_{name}")
        if not refs:
            continue
        if wanted.shape == "one" and len(refs) > 1:
            raise UserError(f"--{name} is given {len(refs)} times; it takes one {wanted.describe()}")
        named = [ref.partition("=") if wanted.shape == "dict" else ("", "", ref) for ref in refs]
        unnamed = next((ref for ref, (key, _, rest) in zip(refs, named, strict=True) if not (key and rest)), None)
        if wanted.shape == "dict" and unnamed is not None:
            raise UserError(f"--{name} {unnamed}: name is missing, write --{name} NAME={unnamed.strip('=') or 'REF'}")
        keys = [key for key, _, _ in named]
        if wanted.shape == "dict" and len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"--{name}: the name {twice!r} is given twice")
        found = [session.load(ref) for _, _, ref in named]
        for artifact in found:
            check_kind(stage, name, artifact)
        shaped = {"one": found[0], "list": found, "dict": dict(zip(keys, found, strict=True))}
        given[name] = shaped[wanted.shape]
    return given
