"""Hash the code that a stage imports, without importing it."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from llmworks.runtime.stages import get_stages

if TYPE_CHECKING:  # listing stages for help must not import pydantic
    pass


@functools.cache
def compute_code_digest(name: str) -> str:
    """Return the digest of a stage's module and of every llmworks module it imports, directly or indirectly."""
    todo = [get_stages()[name].target.partition(":")[0]]
    digests: dict[str, str] = {}
    while todo:
        module = todo.pop()
        if module in digests:
            continue
        file = _find_source(module)
        if file is None:
            continue
        text = file.read_text(encoding="utf-8")
        for data in sorted(file.parent.glob("tasks/*.yaml")):  # task files determine what a stage does
            digests[data.name] = hashlib.sha256(data.read_bytes()).hexdigest()
        digests[module] = hashlib.sha256(text.encode()).hexdigest()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmworks"):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names if alias.name.startswith("llmworks")]
    return hashlib.sha256("".join(f"{m}{d}" for m, d in sorted(digests.items())).encode()).hexdigest()


def _find_source(module: str) -> Path | None:
    """Return the file of a module, found without importing its package."""
    if module.split(".")[0] != "llmworks":  # a stage of another package
        spec = importlib.util.find_spec(module)
        return Path(spec.origin) if spec is not None and spec.origin else None
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
