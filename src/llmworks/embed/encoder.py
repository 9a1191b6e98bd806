"""Sentence encoders: mean pooling of a Transformer's last hidden states (Sentence-BERT, Reimers and Gurevych 2019)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmworks.core.errors import ModelError
from llmworks.embed.vectors import Vectors

BATCH_TOKENS = 4096


class SentenceEncoder:
    """A Hugging Face encoder with mean pooling, in the directory format of sentence-transformers."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.model = AutoModel.from_pretrained(path, local_files_only=True, dtype="float32").eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path}: the sentence encoder cannot be loaded ({str(error).splitlines()[0]})") from None
        self.dimensions: int = self.model.config.hidden_size
        settings = path / "sentence_bert_config.json"
        stated = json.loads(settings.read_text())["max_seq_length"] if settings.exists() else 256
        self.max_length = min(stated, self.model.config.max_position_embeddings)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Embed texts as unit-length vectors [texts, dimensions]; texts are truncated to the encoder's length."""
        import torch

        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_length, add_special_tokens=True)[
            "input_ids"
        ]
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # sort by length to reduce padding
        out = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        at = 0
        while at < len(order):
            count = 1
            while at + count < len(order) and (count + 1) * len(ids[order[at + count]]) <= BATCH_TOKENS:
                count += 1
            chosen = order[at : at + count]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            with torch.inference_mode():
                hidden = self.model(**batch).last_hidden_state  # [texts, tokens, dimensions]
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            out[chosen] = torch.nn.functional.normalize(pooled, dim=1).numpy()
            at += count
        return out
