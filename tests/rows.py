"""Layers of packages and what each may import. `test_house.py` checks the imports, CONTRIBUTING shows the table."""

from __future__ import annotations

# Rows from the bottom up. Packages of one row do not import one another, except in the first and the last row, where
# the order of the list counts. An empty description: the package does not exist yet, its row is decided.
ROWS: list[dict[str, str]] = [
    {
        "core": "types that all packages share: errors, types, artifacts, context, workspace, report, workers",
        "assets": "named real models and data: source, sha256, license",
        "lineage": "lineage of artifacts: ancestors, diff, verify, drawings",
    },
    {
        "tokenize": "train and compare tokenizers; templates, golden tokens and encoding of chats; byte-pair encoding",
        "embed": "embedding models: texts to vectors",
        "guard": "detectors of personal data and secrets",
        "sandbox": "run untrusted code in isolation",
        "observe": "",
        "importers": "convert configurations of other tools to recipes",
    },
    {
        "data": "read, clean, deduplicate, convert, mix, split and pack datasets",
        "model": "create, show and convert models; modules, losses, adapters, quantized layers, files",
        "score": "score functions of a completion: verifiers, judges, constraints",
    },
    {"generate": "inference engines, remote providers, decoding"},
    {
        "train": "pretraining, SFT, distillation; training loop, distributed training, estimates, self-tests",
        "merge": "merge models: methods, plans, tokenizers, mixtures of experts, adapters",
        "quantize": "quantize models: algorithms, calibration, GGUF",
        "interpret": "",
    },
    {
        "align": "preference optimization, reward models, reinforcement learning",
        "evaluate": "evaluation tasks, statistics, comparisons, judges, arenas",
        "retrieve": "",
        "synthesize": "synthetic data, with provenance",
    },
    {"rag": "", "agent": "", "tune": "search by evaluation; benchmarks of running models"},
    {"serve": "OpenAI-compatible server", "studio": "", "deploy": ""},
    {
        "runtime": "stage table, execution, references, recipes, sessions",
        "workflows": "workflows of several stages",
        "commands": "commands: one file each, with parser and handler",
        "cli": "entry point of the command line",
        "__main__": "",
    },
]
