"""`llmworks tasks`: list the built-in tasks and suites."""

from __future__ import annotations

import argparse
from typing import Any

from llmworks.commands.output import print_json, print_line
from llmworks.commands.parsers import Parser, new_parser
from llmworks.core.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `llmworks tasks`."""
    parser = new_parser(
        "tasks", "List the built-in evaluation tasks and suites, or print one task as YAML.", workspace=False
    )
    parser.add_argument("name", nargs="?", help="task name or YAML file")
    parser.add_argument("--harness", action="store_true", help="print the task in the format of lm-evaluation-harness")
    return parser


def handle(args: argparse.Namespace) -> None:
    """`llmworks tasks [NAME] [--harness]`."""
    import yaml

    from llmworks.commands.output import print_table
    from llmworks.evaluate.protocol.load_task import load_task, task_names
    from llmworks.evaluate.protocol.write_harness import to_harness
    from llmworks.evaluate.suites import load_suites

    if args.name:
        task = load_task(args.name)
        fields = _replace_references(to_harness(task)) if args.harness else task.model_dump(exclude_defaults=True)
        if args.json:
            print_json(fields)
        else:
            print_line(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=140).rstrip())
        return
    if args.harness:
        raise UserError("--harness needs the name of a task")
    found = {name: load_task(name) for name in task_names()}
    if args.json:
        print_json(
            {
                "tasks": {n: t.model_dump(exclude_defaults=True) for n, t in found.items()},
                "suites": {n: s.model_dump() for n, s in load_suites().items()},
            }
        )
        return
    print_table(
        ("task", "kind", "score", "data", "description"),
        [(n, t.kind, t.metrics[0].name, t.data, t.what) for n, t in found.items()],
    )
    print_line()
    print_table(("suite", "tasks"), [(n, ", ".join(i.task for i in s.tasks)) for n, s in load_suites().items()])


def _replace_references(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace references by file paths in a task for the lm-evaluation-harness, which cannot resolve them."""
    from llmworks.data.readers.input_files import find_files
    from llmworks.runtime.session import load

    files = fields.get("dataset_kwargs", {}).get("data_files", {})
    for split, ref in files.items():
        if ref.startswith("asset:"):
            found = find_files(load(ref).path)
            files[split] = str(found[0]) if len(found) == 1 else list(map(str, found))
    return fields
