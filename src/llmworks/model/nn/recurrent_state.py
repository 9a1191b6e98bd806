"""Cache of models without attention: a recurrent state of constant size, in place of a growing KV cache."""

from __future__ import annotations

from torch import Tensor

State = tuple[Tensor, ...]  # each [layers, rows, ...]


class StateCache:
    """Recurrent state and number of tokens, with the interface of a transformers cache."""

    is_compileable = False

    def __init__(self) -> None:
        self.state: State | None = None
        self.tokens = 0

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of tokens processed."""
        return self.tokens

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.state = None if self.state is None else tuple(s[:, indices] for s in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.state = None if self.state is None else tuple(s.repeat_interleave(repeats, 1) for s in self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)
