"""Text embeddings: one interface over sentence encoders and static embeddings. Does not handle documents or indexes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llmworks.core.errors import ModelError
from llmworks.embed.vectors import Vectors


class Embedder(Protocol):
    """A text embedder: vectors have unit length, so the dot product of two is their cosine similarity."""

    dimensions: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts as fp32 vectors [texts, dimensions]; a text without tokens gets zeros."""
        ...


def load_embedder(path: Path) -> Embedder:
    """Load the embedder in a directory.

    It is a sentence encoder (Hugging Face, with config.json) or static embeddings (an embedding table and a tokenizer).

    Errors: ModelError for anything else.
    """
    if (path / "config.json").exists():
        from llmworks.embed.encoder import SentenceEncoder

        return SentenceEncoder(path)
    if (path / "model.safetensors").exists() and (path / "tokenizer.json").exists():
        from llmworks.embed.static import StaticEmbeddings

        return StaticEmbeddings(path)
    raise ModelError(
        f"{path}: holds no embedder; expected a sentence encoder (config.json) or static embeddings"
        " (model.safetensors, tokenizer.json)"
    )
