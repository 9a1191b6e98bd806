"""Usage of a remote engine: requests, tokens and cost, counted across threads.

Cost is counted where prices are given.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from llmworks.core.errors import EngineError

MILLION = 1_000_000


@dataclass
class UsageMeter:
    """Prices are per million tokens, in any currency; `budget` is the maximum cost (0: no limit)."""

    input_price: float = 0.0
    output_price: float = 0.0
    budget: float = 0.0
    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def cost(self) -> float:
        """Cost so far."""
        return self.compute_cost(self.prompt_tokens, self.completion_tokens)

    def compute_cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the cost of these tokens."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / MILLION

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a completion."""
        with self._lock:
            self.requests += 1
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens

    def count_retry(self) -> None:
        """Count a retry."""
        with self._lock:
            self.retries += 1

    def check_budget(self) -> None:
        """Raise EngineError when the budget is spent."""
        if self.budget and self.cost >= self.budget:
            raise EngineError(
                f"the budget of {self.budget:g} is spent ({self.cost:.4g}); raise `budget` in the model's"
                " reference to continue"
            )
