"""What each command takes: its parser, built when it is typed; nothing heavy is imported for help.

Knows no command's work.
"""

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


def _parser(name: str, handler: str, what: str, *, workspace: bool = True, json: bool = True) -> Parser:
    parser = Parser(prog=f"llmworks {name}", description=what, allow_abbrev=False)
    parser.set_defaults(handler=handler)
    if workspace:
        parser.add_argument("--workspace", type=Path, help="default: $LLMWORKS_WORKSPACE, else ./workspace")
    if json:
        parser.add_argument("--json", action="store_true", help="print the result for programs")
    return parser


def workers(parser: Parser) -> None:
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


def _run() -> Parser:
    parser = _parser("run", "making.run", "Run a recipe: skip what is up to date, go on from what was interrupted.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    workers(parser)
    parser.add_argument("--explain", action="store_true", help="say why each step runs or is skipped")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _plan() -> Parser:
    parser = _parser(
        "plan", "making.plan", "What would run, why, and its time, memory and disk. Runs and fetches nothing."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--try",
        action="store_true",
        dest="attempt",
        help="run a few steps of each training for its time and memory on this machine",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="how many train together (--nproc, torchrun), for memory of each",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    return parser


def _selftest() -> Parser:
    parser = _parser(
        "train selftest",
        "training.selftest",
        "Does the configuration of a recipe's trainings hold? Each, on a shrunken model and its first rows, in"
        " seconds.",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("step", nargs="?", help="one of its trainings; default: all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="change a config field of a step"
    )
    return parser


def _sweep() -> Parser:
    parser = _parser(
        "tune sweep",
        "tuning.sweep",
        "Look for the best values of a recipe's fields: each trial is a run of it with others. What was killed"
        " goes on.",
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "search",
        type=Path,
        help="YAML file: metric (STEP.METRIC), direction, fields (STEP.FIELD to choices, or low and high), trials",
    )
    parser.add_argument("--trials", type=int, default=None, metavar="N", help="how many in all, in place of the file's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STEP.FIELD=VALUE",
        help="change a config field of a step in all trials",
    )
    workers(parser)
    return parser


def _frontier(name: str = "tune frontier", ways: str = "", suite: str = "") -> Parser:
    parser = _parser(
        name,
        "tuning.frontier",
        "Quantize a model in many ways, and say what each takes and what it costs. What was killed goes on.",
    )
    parser.add_argument("model")
    parser.add_argument(
        "--data",
        required=True,
        metavar="REF",
        help="conversations or texts of what the model is for: to calibrate by, and others to measure on",
    )
    parser.add_argument(
        "--ways",
        default=ways,
        metavar="NAMES",
        help=(
            "ways with commas between, or how their names begin (gptq, gguf-q4 ...); default: all"
            if not ways
            else "which GGUF files; default: all"
        ),
    )
    parser.set_defaults(only=ways)
    parser.add_argument(
        "--suite",
        default=suite,
        metavar="NAMES",
        help="suites or tasks with commas between, that all are asked; default: none",
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="MB",
        help="megabytes that the files may have: the nearest to the model within it is recommended",
    )
    parser.add_argument(
        "--texts", type=int, default=128, metavar="N", help="texts of 512 tokens to calibrate by (default 128)"
    )
    parser.add_argument(
        "--held", type=int, default=16, metavar="N", help="texts of 512 tokens to measure on (default 16)"
    )
    parser.add_argument("--out", type=Path, help="name of the page: a link to it in the workspace's store")
    parser.add_argument("--pick", type=Path, metavar="NAME", help="name of the model that is recommended: a link to it")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _autoquant() -> Parser:
    return _frontier("autoquant")


def _autogguf() -> Parser:
    return _frontier("autogguf", ways="gguf-")


def _import() -> Parser:
    parser = _parser(
        "import",
        "translating.translate",
        "Make a recipe of a configuration of Axolotl or LLaMA-Factory, and say what became of each of its keys.",
        workspace=False,
    )
    parser.add_argument("file", type=Path, help="its YAML file")
    parser.add_argument("--out", type=Path, help="the recipe's file; default: it is printed")
    return parser


def _stages() -> Parser:
    parser = _parser(
        "stages", "making.stages", "The stage table, or one stage with its inputs and fields.", workspace=False
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("--schema", action="store_true", help="a JSON schema of recipes, for editors")
    return parser


def _show() -> Parser:
    parser = _parser("show", "artifacts.show", "Where an artifact came from and what was measured.")
    parser.add_argument("artifact")
    return parser


def _tree() -> Parser:
    parser = _parser(
        "tree", "artifacts.tree", "The family tree of the workspace, or of one artifact and its ancestors."
    )
    parser.add_argument("artifact", nargs="?")
    parser.add_argument(
        "--among",
        action="append",
        default=[],
        metavar="REF",
        help="models that the artifact, a model, may be made of: its weights are asked",
    )
    parser.add_argument(
        "--models",
        action="store_true",
        help="only models, adapters and tokenizers; what stood between them is passed over",
    )
    for kind, what in (
        ("html", "a page to zoom and search"),
        ("svg", "a drawing"),
        ("png", "a picture"),
        ("mermaid", "Mermaid, for Markdown"),
    ):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"also write it as {what}")
    return parser


def _verify() -> Parser:
    parser = _parser(
        "verify",
        "artifacts.verify",
        "Check files of an artifact and its ancestors, and derive exact steps again; or replay golden tokens.",
    )
    parser.add_argument("artifact")
    parser.add_argument(
        "engine", nargs="?", help="with --golden: a GGUF file, a server or another model that must agree with the first"
    )
    parser.add_argument(
        "--golden", action="store_true", help="replay the model's golden tokens instead, on itself or on another engine"
    )
    parser.add_argument(
        "--within",
        type=float,
        default=None,
        help=(
            "with --golden: how far logits may be away on average (default: by the type of a GGUF file, 0.3 where it is"
            " not known; else 0.05)"
        ),
    )
    return parser


def _diff() -> Parser:
    parser = _parser("diff", "artifacts.diff", "Which config fields, parents, files and metrics differ.")
    parser.add_argument("a")
    parser.add_argument("b")
    return parser


def _gc() -> Parser:
    parser = _parser("gc", "artifacts.gc", "Remove artifacts that no name and no descendant of a name needs.")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--scratch", action="store_true", help="also remove checkpoints of interrupted steps")
    return parser


def _assets() -> Parser:
    parser = _parser("assets", "artifacts.assets_list", "Named real models and data.", workspace=False, json=False)
    below = parser.add_subparsers(required=True, metavar="list|fetch|path")
    listing = below.add_parser("list", help="all assets, with licence and source")
    listing.add_argument("--json", action="store_true", help="print the result for programs")
    listing.set_defaults(handler="artifacts.assets_list")
    fetch = below.add_parser("fetch", help="download and verify")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    fetch.set_defaults(handler="artifacts.assets_fetch")
    path = below.add_parser("path", help="where a fetched asset lies")
    path.add_argument("name", metavar="NAME")
    path.set_defaults(handler="artifacts.assets_path")
    return parser


def _chat() -> Parser:
    parser = _parser(
        "chat",
        "models.chat",
        "Talk to a model. Without a message, a conversation; with one, a single answer.",
        json=False,
    )
    parser.add_argument("model")
    parser.add_argument("message", nargs="?", help="ask once and print the answer")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of functions shown to the model")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=None)
    return parser


def _evolve() -> Parser:
    parser = _parser(
        "tune evolve",
        "tuning.evolve",
        "The numbers of a merge by CMA-ES: each attempt is merged and asked; the best is kept, and asked other tasks,"
        " too.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help="mergekit's YAML; its weights, densities, t and lambda are searched from the values that it has",
    )
    parser.add_argument(
        "--suite",
        default="",
        metavar="NAMES",
        help="suites or tasks with commas between, by whose mean score it is searched",
    )
    parser.add_argument(
        "--held", default="", metavar="NAMES", help="others that parents and child are asked at the end"
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument("--attempts", type=int, default=40, metavar="N", help="merges at least (default 40)")
    parser.add_argument("--population", type=int, default=8, metavar="N", help="merges of a generation (default 8)")
    parser.add_argument(
        "--gradient",
        type=int,
        default=1,
        metavar="N",
        help="weights and t at so many points over the layers, in place of one",
    )
    parser.add_argument("--negative", action="store_true", help="weights may be below 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one key of the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="name of the page")
    parser.add_argument("--pick", type=Path, metavar="NAME", help="name of the best merge")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _lazymerge() -> Parser:
    parser = _parser(
        "lazymerge",
        "merging.lazymerge",
        "Write mergekit's YAML for some models, merge them, ask parents and child a suite of tasks, and write the"
        " child's card.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="paths, names in the workspace, asset:NAME, ORG/NAME of the Hub, MODEL+ADAPTER",
    )
    parser.add_argument(
        "--method",
        default="linear",
        help="linear, slerp, ties, dare_ties, task_arithmetic, model_stock, karcher ... (llmworks stages merge)",
    )
    parser.add_argument(
        "--base",
        default="",
        metavar="MODEL",
        help="what the models were tuned from, for methods that measure from it; of slerp one of the two",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of the models beside the base; default: the same for all"
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="share of changes that is kept, of methods that drop some (default 0.5)",
    )
    parser.add_argument("--t", type=float, default=0.5, help="of slerp and nearswap (default 0.5)")
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="NAMES",
        help="suites or tasks with commas between; empty: none (default quick)",
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="name of the child")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="also a directory to upload to the Hub: weights, and a card with the scores",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _merge() -> Parser:
    parser = _parser(
        "merge",
        "merging.merge",
        "Merge models by mergekit's YAML. `llmworks stages merge` lists its keys; `llmworks merge STAGE --help` tells"
        " of the stages of the group.",
    )
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        help=(
            "YAML: merge_method, models or slices, base_model, parameters ...; models are paths, names in the"
            " workspace, asset:NAME, ORG/NAME of the Hub, MODEL+ADAPTER"
        ),
    )
    parser.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="NAME=REF",
        help="what a name in the file stands for, where it is no reference itself",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one key of the file, as parameters.t=0.4"
    )
    parser.add_argument(
        "--plan", action="store_true", help="only say what would be read and written; looks at headers alone"
    )
    parser.add_argument("--methods", action="store_true", help="only list the methods with their parameters")
    parser.add_argument(
        "--out", type=Path, metavar="NAME", help="name of the result: a link to it in the workspace's store"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the methods that drop at random")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _serve() -> Parser:
    parser = _parser(
        "serve",
        "models.serve",
        "Answer the OpenAI API over HTTP: /v1/models, /v1/chat/completions, /health.",
        json=False,
    )
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", default="", help="the model's name in the API; default: the artifact's")
    return parser


def _autoeval() -> Parser:
    from llmworks.evaluate.suites import suites

    told = "; ".join(f"{name}: {suite.what}" for name, suite in suites().items())
    parser = _parser(
        "autoeval",
        "evaluation.autoeval",
        "Ask models a suite of tasks, and make the leaderboard of all evaluations in the workspace.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument(
        "--suite",
        default="quick",
        metavar="NAMES",
        help=f"suites or tasks with commas between; {told}".replace("%", "%%"),
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="only the first rows of each task")
    parser.add_argument("--out", type=Path, help="name of the leaderboard: a link to it in the workspace's store")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _arena() -> Parser:
    parser = _parser(
        "arena",
        "evaluation.arena",
        "Vote in the terminal for the better of two answers, without knowing whose they are.",
        json=False,
    )
    parser.add_argument(
        "reports", nargs="+", metavar="REPORT", help="evaluations of one task that models answered in writing"
    )
    parser.add_argument("--votes", type=Path, required=True, metavar="FILE", help="JSONL file that votes are added to")
    parser.add_argument("--voter", default="", help="who votes; default: the user's name")
    parser.add_argument("--seed", type=int, default=0, help="order and sides of the pairs")
    return parser


def _tasks() -> Parser:
    parser = _parser(
        "tasks", "evaluation.tasks", "The built-in tasks and suites, or one task as YAML.", workspace=False
    )
    parser.add_argument("name", nargs="?", help="a task, or a YAML file of one")
    parser.add_argument("--harness", action="store_true", help="the task as the lm-evaluation-harness has it")
    return parser


COMMANDS = {
    "tasks": _tasks,
    "arena": _arena,
    "autoeval": _autoeval,
    "run": _run,
    "plan": _plan,
    "train selftest": _selftest,
    "tune sweep": _sweep,
    "tune frontier": _frontier,
    "autoquant": _autoquant,
    "autogguf": _autogguf,
    "import": _import,
    "stages": _stages,
    "show": _show,
    "tree": _tree,
    "verify": _verify,
    "diff": _diff,
    "gc": _gc,
    "assets": _assets,
    "merge": _merge,
    "lazymerge": _lazymerge,
    "tune evolve": _evolve,
    "chat": _chat,
    "serve": _serve,
}
