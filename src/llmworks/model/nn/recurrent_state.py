"""What models without attention know of the tokens before: a state of one size, in place of keys and values that grow.

Knows none of them.
"""

from __future__ import annotations

from torch import Tensor

State = tuple[Tensor, ...]  # each [layers, rows, ...]


class StateCache:
    """What stands for a key-value cache: the state, and how many tokens it knows."""

    is_compileable = False

    def __init__(self) -> None:
        self.state: State | None = None
        self.tokens = 0

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens that were read."""
        return self.tokens

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.state = None if self.state is None else tuple(s[:, indices] for s in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.state = None if self.state is None else tuple(s.repeat_interleave(repeats, 1) for s in self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, as beam search names it."""
        self.batch_select_indices(beam_idx)
