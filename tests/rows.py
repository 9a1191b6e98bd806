"""The rows of the house: which room may know which. `test_house.py` walks the imports, CONTRIBUTING shows the table."""

from __future__ import annotations

# Rows from the bottom up. Rooms of one row do not know one another, except in the first and the last row, where the
# order of the list holds. What each room is for stands beside its name; a room that is not built yet has a place.
ROWS: list[dict[str, str]] = [
    {
        "core": "the nouns that every room exchanges: errors, types, artifacts, context, workspace, report, workers",
        "assets": "named real models and data: source, sha256, licence",
        "lineage": "the family tree of a workspace: ancestors, diff, verify, drawings",
    },
    {
        "tokenize": "train and compare tokenizers; templates, golden tokens and encoding of chats; byte-pair encoding",
        "embed": "texts to vectors",
        "guard": "text to a verdict: personal data, secrets",
        "sandbox": "run untrusted code",
        "observe": "",
        "importers": "configurations of other tools to recipes",
    },
    {
        "data": "one file a stage: read, clean, dedup, chat, pack ...",
        "model": "make, show and convert models; modules, losses, adapters, low-bit layers, files",
        "score": "(prompt, completion, row) to a score",
    },
    {"generate": "engines, providers, decoding"},
    {
        "train": "pretrain, sft, distill ...; the loop, processes, estimates, self-tests",
        "merge": "several models as one: methods, plans, tokenizers, experts, adapters",
        "quantize": "fewer bits: algorithms, calibration, GGUF",
        "interpret": "",
    },
    {
        "align": "preferences, rewards, reinforcement learning",
        "evaluate": "tasks, statistics, comparisons, judges, arenas",
        "retrieve": "",
        "synthesize": "data made by a model, with its origin",
    },
    {"rag": "", "agent": "", "tune": "search judged by evaluation; what it takes to run a model"},
    {"serve": "the OpenAI API over HTTP", "studio": "", "deploy": ""},
    {
        "runtime": "the stage table, execute, references, recipes, the runner, the session",
        "workflows": "what runs several stages",
        "commands": "one file a command: its parser and its handler",
        "cli": "an argument shell",
        "__main__": "",
    },
]
