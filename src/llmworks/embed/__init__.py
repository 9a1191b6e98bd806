"""Texts to vectors: one interface over sentence encoders and static vectors. Knows no document and no index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llmworks.core.errors import ModelError
from llmworks.embed.vectors import Vectors


class Embedder(Protocol):
    """Gives every text a vector of unit length; the product of two is their cosine."""

    dimensions: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Vectors [texts, dimensions] in fp32; a text without tokens has zeros."""
        ...


def open_embedder(path: Path) -> Embedder:
    """The embedder in a directory: a sentence encoder (Hugging Face, with config.json) or static vectors (a table and a
    tokenizer).

    Errors: ModelError for anything else.
    """
    if (path / "config.json").exists():
        from llmworks.embed.encoder import Encoder

        return Encoder(path)
    if (path / "model.safetensors").exists() and (path / "tokenizer.json").exists():
        from llmworks.embed.static import StaticVectors

        return StaticVectors(path)
    raise ModelError(
        f"{path}: holds no embedder; wanted is a sentence encoder (config.json) or static vectors (model.safetensors,"
        " tokenizer.json)"
    )
