"""One workshop for the whole life cycle of a language model.

`run` runs a recipe, `Session.make` runs one stage, `load` loads an artifact, `open_engine` opens an engine over a
model. Each name is imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import (
    AccessError,
    ArtifactError,
    AssetError,
    DataError,
    EngineError,
    GateFailed,
    GoldenMismatch,
    LlmworksError,
    MissingDependency,
    ModelError,
    RecipeError,
    RequestError,
    TrainingError,
    UserError,
    WorkerLost,
)
from llmworks.core.machine import bound_spinning

if TYPE_CHECKING:
    from llmworks.core.artifact import Adapter, Artifact, Dataset, Model, Report, Tokenizer
    from llmworks.core.types import Completion, Message, Request, Sampling
    from llmworks.runtime.runner import run
    from llmworks.runtime.session import Session, load, open_engine

bound_spinning()  # before torch is imported

_LAZY = {
    "run": "llmworks.runtime.runner",
    "Session": "llmworks.runtime.session",
    "load": "llmworks.runtime.session",
    "open_engine": "llmworks.runtime.session",
    **dict.fromkeys(("Adapter", "Artifact", "Dataset", "Model", "Report", "Tokenizer"), "llmworks.core.artifact"),
    **dict.fromkeys(("Completion", "Message", "Request", "Sampling"), "llmworks.core.types"),
}

__all__ = [
    "AccessError",
    "Adapter",
    "Artifact",
    "ArtifactError",
    "AssetError",
    "Completion",
    "DataError",
    "Dataset",
    "EngineError",
    "GateFailed",
    "GoldenMismatch",
    "LlmworksError",
    "Message",
    "MissingDependency",
    "Model",
    "ModelError",
    "RecipeError",
    "Report",
    "Request",
    "RequestError",
    "Sampling",
    "Session",
    "Tokenizer",
    "TrainingError",
    "UserError",
    "WorkerLost",
    "load",
    "open_engine",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("llmworks")
    if name not in _LAZY:
        raise AttributeError(f"module 'llmworks' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
