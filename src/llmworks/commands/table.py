"""The only table of commands: arguments in a line, and what each does. Help and the README are made of it."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """One row. The file is `commands/NAME.py`, with `build_parser` and `handle`."""

    group: str
    arguments: str
    what: str

    @staticmethod
    def module(name: str) -> str:
        """The file of a command, by its name; `import` is a word of Python."""
        return "import_" if name == "import" else name.replace(" ", "_")


COMMANDS: dict[str, Command] = {
    "run": Command("recipes", "RECIPE", "run a recipe; what is up to date is skipped, what was interrupted goes on"),
    "plan": Command("recipes", "RECIPE", "what would run, why, and its time, memory and disk"),
    "tune sweep": Command("recipes", "RECIPE SEARCH", "the best values of a recipe's fields, by trials"),
    "train selftest": Command(
        "recipes", "RECIPE [STEP]", "does the configuration of its trainings hold? in seconds, on a shrunken model"
    ),
    "import": Command("recipes", "FILE", "a configuration of Axolotl or LLaMA-Factory as a recipe"),
    "stages": Command("recipes", "[NAME]", "the stage table, or one stage with its inputs and fields"),
    "show": Command("artifacts", "ARTIFACT", "where an artifact came from and what was measured"),
    "tree": Command("artifacts", "[ARTIFACT]", "the family tree of the workspace, or of one artifact"),
    "verify": Command(
        "artifacts",
        "ARTIFACT",
        "check its files and its ancestors', derive exact steps again, byte for byte; --golden MODEL [ENGINE]: replay"
        " golden tokens",
    ),
    "diff": Command("artifacts", "A B", "which fields, parents and metrics differ"),
    "gc": Command("artifacts", "", "remove what no name and no descendant needs"),
    "assets": Command("artifacts", "list|fetch|path", "named real models and data, verified"),
    "merge": Command("models", "FILE", "models as one, by mergekit's YAML"),
    "lazymerge": Command("models", "--models A B", "the YAML, the merge, scores of parents and child, a card"),
    "tune evolve": Command("models", "FILE", "the numbers of a merge, by evaluation"),
    "tune frontier": Command("models", "MODEL", "its quantizations: sizes, damage, speeds, skills"),
    "autoquant": Command("models", "MODEL", "the same as tune frontier"),
    "autogguf": Command("models", "MODEL", "tune frontier with GGUF files only"),
    "autoeval": Command("models", "MODEL ...", "a suite of tasks on models, and the leaderboard of the workspace"),
    "tasks": Command("models", "[NAME]", "the tasks and suites that models are evaluated on"),
    "arena": Command("models", "REPORT ...", "vote for the better of two answers, without knowing whose they are"),
    "chat": Command("models", "MODEL", "talk to a model in the terminal"),
    "serve": Command("models", "MODEL", "answer the OpenAI API over HTTP"),
}
STAGE_USAGE = "GROUP STAGE [--INPUT] REF ... [--config FILE] [--set key=value] --out NAME"


def lines(group: str) -> str:
    """The commands of a group, as help prints them."""
    width = 30
    return "\n".join(
        f"  {f'{name} {command.arguments}':<{width}}{command.what}"
        for name, command in COMMANDS.items()
        if command.group == group
    )
