"""Find stop strings in streamed text: how much can be shown, and where the completion ends."""

from __future__ import annotations

from collections.abc import Sequence


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there was one."""
    at = min((i for i in (text.find(s) for s in stop if s) if i >= 0), default=-1)
    return (text[:at], True) if at >= 0 else (text, False)


def displayable_length(text: str, stop: Sequence[str]) -> int:
    """Return how many characters can be shown.

    Excluded: the possible start of a stop string, and a character whose bytes are incomplete.
    """
    end = len(text.rstrip("\ufffd"))
    for s in stop:
        for n in range(min(len(s) - 1, end), 0, -1):
            if text[:end].endswith(s[:n]):
                end -= n
                break
    return end
