"""Signs of reward hacking in the step metrics of a training on rollouts.

Does not know how metrics are computed (see `sampling`) or reported (see `align/report.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MEAN_LENGTH, CLIPPED_RATIO, ZERO_STD = "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"
MAX_LENGTH_GROWTH = 1.5  # of the mean completion length
MAX_REPETITION = 0.2  # share of repeated 4-grams


def find_reward_hacking(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Return signs of reward hacking: changes from the first tenth of the steps to the last."""
    tenth = max(1, len(steps) // 10)
    first, last = (
        {
            name: sum(row.get(name, 0.0) for row in part) / len(part)
            for name in ("reward", MEAN_LENGTH, "repeated", CLIPPED_RATIO, ZERO_STD)
        }
        for part in (steps[:tenth], steps[-tenth:])
    )
    warnings = []
    if last[MEAN_LENGTH] > MAX_LENGTH_GROWTH * max(1.0, first[MEAN_LENGTH]):
        warnings.append(
            f"completions grew {last[MEAN_LENGTH] / max(1.0, first[MEAN_LENGTH]):.1f} times longer"
            f" ({first[MEAN_LENGTH]:.0f} to {last[MEAN_LENGTH]:.0f} tokens): check whether the reward favors length"
        )
    if last["repeated"] > MAX_REPETITION and last["repeated"] > 2 * first["repeated"]:
        warnings.append(
            f"completions repeat themselves: {last['repeated']:.0%} of their 4-grams occurred before,"
            f" {first['repeated']:.0%} at first"
        )
    if last[CLIPPED_RATIO] > 0.5:
        warnings.append(
            f"{last[CLIPPED_RATIO]:.0%} of the completions are truncated at max_completion_length,"
            f" {first[CLIPPED_RATIO]:.0%} at first"
        )
    if last[ZERO_STD] > 0.8:
        warnings.append(
            f"in {last[ZERO_STD]:.0%} of the groups all completions have the same reward, so there is little"
            " learning signal left"
        )
    return warnings
