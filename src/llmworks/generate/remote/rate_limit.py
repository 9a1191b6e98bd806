"""Rate limits of a remote server: requests and tokens per minute, server-requested pauses, exponential backoff.

One limiter is shared by all threads that use one server.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable

from llmworks.core.errors import EngineError

MINUTE = 60.0
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0


class RateLimiter:
    """Sliding window over the last minute's requests and tokens (limit 0: none)."""

    def __init__(self, requests: int = 0, tokens: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests, self.tokens, self._clock = requests, tokens, clock
        self._lock = threading.Lock()
        self._recent: deque[list[float]] = deque()  # [time, tokens]
        self._not_before = 0.0
        self._closed = threading.Event()

    def acquire(self, tokens: int) -> list[float]:
        """Wait until a request of about this many tokens may be sent; return the entry for `correct_usage`.

        EngineError when closed meanwhile.
        """
        while True:
            with self._lock:
                delay = self._compute_delay(tokens)
                if delay <= 0:
                    entry = [self._clock(), float(tokens)]
                    self._recent.append(entry)
                    return entry
            self.sleep(delay)

    def correct_usage(self, entry: list[float], tokens: int) -> None:
        """Correct a request's tokens to the actual usage."""
        with self._lock:
            entry[1] = float(tokens)

    def pause(self, seconds: float) -> None:
        """Block all requests for this many seconds, as the server asked."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait; EngineError when the engine is closed meanwhile."""
        if self._closed.wait(seconds):
            raise EngineError("the engine was closed")

    def close(self) -> None:
        """Wake all waiting threads."""
        self._closed.set()

    def _compute_delay(self, tokens: int) -> float:
        """Return the seconds until a request may be sent; the lock is held."""
        now = self._clock()
        while self._recent and self._recent[0][0] <= now - MINUTE:
            self._recent.popleft()
        if now < self._not_before:
            return self._not_before - now
        if self.requests and len(self._recent) >= self.requests:
            return self._recent[len(self._recent) - self.requests][0] + MINUTE - now
        if self.tokens and self._recent:
            over = sum(entry[1] for entry in self._recent) + tokens - self.tokens
            for when, used in self._recent if over > 0 else ():
                over -= used
                if over <= 0:
                    return when + MINUTE - now
            if over > 0:  # larger than a minute's limit: sent when the window is empty
                return self._recent[-1][0] + MINUTE - now
        return 0.0


def compute_backoff(attempt: int) -> float:
    """Return the seconds before the next attempt: exponential backoff with jitter."""
    return float(min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0))
