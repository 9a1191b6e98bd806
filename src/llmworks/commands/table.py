"""The table of commands: arguments and a one-line description. Help and the README are generated from it."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """One row. The file is `commands/NAME.py`, with `build_parser` and `handle`."""

    group: str
    arguments: str
    summary: str

    @staticmethod
    def get_module_name(name: str) -> str:
        """Return the module name of a command; `import` is a Python keyword."""
        return "import_" if name == "import" else name.replace(" ", "_")


COMMANDS: dict[str, Command] = {
    "run": Command("recipes", "RECIPE", "Run a recipe, skip steps that are up to date and resume interrupted ones"),
    "plan": Command("recipes", "RECIPE", "Show what would run, why, and its time, memory and disk space"),
    "tune sweep": Command("recipes", "RECIPE SEARCH", "Search hyperparameters of a recipe by trial runs"),
    "train selftest": Command(
        "recipes", "RECIPE [STEP]", "Check a recipe's training configuration in seconds on a shrunken model"
    ),
    "import": Command("recipes", "FILE", "Convert an Axolotl or LLaMA-Factory configuration to a recipe"),
    "stages": Command("recipes", "[NAME]", "List the stages, or describe one with its inputs and fields"),
    "show": Command("artifacts", "ARTIFACT", "Show an artifact's origin, config, metrics and files"),
    "tree": Command("artifacts", "[ARTIFACT]", "Show the family tree of the workspace or of one artifact"),
    "verify": Command(
        "artifacts",
        "ARTIFACT",
        "Check the files of an artifact and its ancestors, reproduce exact steps byte for byte; --golden MODEL"
        " [ENGINE]: replay golden tokens",
    ),
    "diff": Command("artifacts", "A B", "Show which config fields, parents, files and metrics of two artifacts differ"),
    "gc": Command("artifacts", "", "Remove artifacts that are neither named nor ancestors of a named artifact"),
    "assets": Command(
        "artifacts", "list|fetch|path", "List, download and locate named models and data sets, verified by digest"
    ),
    "merge": Command("models", "FILE", "Merge models by mergekit's YAML"),
    "lazymerge": Command(
        "models", "--models A B", "Write a merge's YAML, merge, evaluate parents and child, write a model card"
    ),
    "tune evolve": Command("models", "FILE", "Search the parameters of a merge by evaluation (CMA-ES)"),
    "tune frontier": Command(
        "models", "MODEL", "Quantize a model by many methods and compare size, quality loss, speed and skills"
    ),
    "autoquant": Command("models", "MODEL", "Quantize a model by many methods and recommend one"),
    "autogguf": Command("models", "MODEL", "Convert a model to many GGUF types and recommend one"),
    "autoeval": Command(
        "models", "MODEL ...", "Evaluate models on a suite of tasks and build the workspace's leaderboard"
    ),
    "tasks": Command("models", "[NAME]", "List the evaluation tasks and suites, or print one task"),
    "arena": Command("models", "REPORT ...", "Vote for the better of two anonymous answers"),
    "chat": Command("models", "MODEL", "Chat with a model in the terminal"),
    "serve": Command("models", "MODEL", "Serve an OpenAI-compatible API over HTTP"),
}
STAGE_USAGE = "GROUP STAGE [--INPUT] REF ... [--config FILE] [--set key=value] --out NAME"


def format_commands(group: str) -> str:
    """Format the commands of a group for help."""
    width = 30
    return "\n".join(
        f"  {f'{name} {command.arguments}':<{width}}{command.summary}"
        for name, command in COMMANDS.items()
        if command.group == group
    )
