"""A KV cache that grows in place: space is reserved ahead, so that appending a token does not copy the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

RESERVED_TOKENS = 64  # tokens of space reserved ahead


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: views [rows, heads, length, dim] into a larger buffer."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize without a buffer."""
        super().lazy_initialization(key_states, value_states)
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, new = self.get_seq_length(), key_states.shape[-2]
        if self.buffers is None or length + new > self.buffers[0].shape[-2]:
            self.buffers = (
                self._reserve(self.keys, key_states, length),
                self._reserve(self.values, value_states, length),
            )
        keys, values = self.buffers
        keys[:, :, length : length + new] = key_states
        values[:, :, length : length + new] = value_states
        self.keys, self.values = keys[:, :, : length + new], values[:, :, : length + new]
        return self.keys, self.values

    @staticmethod
    def _reserve(old: Tensor | None, new: Tensor, length: int) -> Tensor:
        rows, heads, added, dim = new.shape
        buffer = torch.empty(rows, heads, length + added + RESERVED_TOKENS, dim, dtype=new.dtype, device=new.device)
        if length and old is not None:
            buffer[:, :, :length] = old
        return buffer

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        self.buffers = None


def create_cache(model: Any) -> Any:
    """Return an empty cache for a model: its own type if it has one, else a growing KV cache."""
    return model.new_cache() if hasattr(model, "new_cache") else create_growing_cache()


def create_growing_cache() -> DynamicCache:
    """Return an empty cache that creates a growing layer for every attention layer."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache
