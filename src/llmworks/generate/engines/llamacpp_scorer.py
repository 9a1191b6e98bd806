"""Logits of given token ids from llama.cpp, through cyllama: the binding used for generation does not return them.

Does not tokenize.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp as cy

F32 = 0  # ggml_type: the KV cache is not quantized
FLASH_ATTENTION_OFF = 0  # llama_flash_attn_type: the fused kernel rounds to fp16


class _Model(cy.LlamaModel):  # type: ignore[misc]
    """A cyllama model with `n_vocab`, which cyllama reads when logits are requested but does not define."""

    @property
    def n_vocab(self) -> int:
        """Vocabulary size."""
        return int(self.get_vocab().n_vocab)


class LlamaCppScorer:
    """Scoring context over one GGUF file for up to `tokens` ids per sequence."""

    def __init__(self, path: Path, tokens: int, threads: int) -> None:
        model_params = cy.LlamaModelParams()
        model_params.n_gpu_layers = 0
        self.model = _Model(str(path), model_params)
        self.params = cy.LlamaContextParams()
        self.params.n_ctx = self.params.n_batch = tokens
        self.params.type_k = self.params.type_v = F32
        self.params.flash_attn_type = FLASH_ATTENTION_OFF
        self.params.n_threads = self.params.n_threads_batch = threads

        self.context = cy.LlamaContext(self.model, self.params)
        self.cached_ids: list[int] = []  # ids in the KV cache

    def compute_logits(self, ids: Sequence[int], first: int) -> list[Any]:
        """Return next-token logits after every position from `first` on: one fp32 array [vocabulary] each.

        A prefix shared with the previous sequence is not computed again.
        """
        same = 0
        while same < min(len(self.cached_ids), len(ids), first) and self.cached_ids[same] == ids[same]:
            same += 1
        if same < len(self.cached_ids) and not self.context.memory_seq_rm(
            0, same, -1
        ):  # recurrent states cannot be truncated
            self.context.kv_cache_clear()
            same = 0
        self.cached_ids = []
        batch = cy.LlamaBatch(n_tokens=len(ids) - same, embd=0, n_seq_max=1)
        for position in range(same, len(ids)):
            batch.add(int(ids[position]), position, [0], position >= first)
        self.context.decode(batch)
        self.cached_ids = list(ids)
        return [np.array(self.context.get_logits_ith(i - same), dtype=np.float32) for i in range(first, len(ids))]
