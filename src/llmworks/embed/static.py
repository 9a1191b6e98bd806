"""Static embeddings: the mean of token embeddings over a text (as WordLlama and Model2Vec).

Fast, but ignores word order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmworks.core.errors import ModelError
from llmworks.embed.vectors import Vectors

BATCH = 256


class StaticEmbeddings:
    """An embedding table [tokens, dimensions] with its tokenizer."""

    def __init__(self, path: Path, max_tokens: int = 512) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        try:
            tensors = load_file(path / "model.safetensors")
            self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: the static embeddings cannot be read ({error})") from None
        except Exception as error:  # tokenizers raises a bare Exception
            raise ModelError(f"{path}/tokenizer.json: cannot be read ({error})") from None
        tables = [t for t in tensors.values() if t.ndim == 2]
        if len(tables) != 1:
            raise ModelError(f"{path}/model.safetensors: holds {len(tables)} 2-D tensors, expected one embedding table")
        self.table = tables[0].astype(np.float32)
        self.dimensions = self.table.shape[1]
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts as unit-length vectors [texts, dimensions]."""
        out = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for at in range(0, len(texts), BATCH):
            encoded = self.tokenizer.encode_batch_fast(
                [t[:20_000] for t in texts[at : at + BATCH]], add_special_tokens=False
            )
            for i, one in enumerate(encoded, at):
                ids = one.ids
                if ids:
                    out[i] = self.table[np.minimum(ids, len(self.table) - 1)].mean(axis=0)
        length = np.linalg.norm(out, axis=1, keepdims=True)
        np.divide(out, length, out=out, where=length > 0)
        return out
