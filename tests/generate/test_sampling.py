"""Sampling against its definitions."""

from __future__ import annotations

import torch

from llmworks.generate.decode.sampling import filter_top_k, filter_top_p, sample_token
from llmworks.generate.decode.stopping import cut_at_stop, displayable_length


def test_top_k_keeps_k() -> None:
    kept = filter_top_k(torch.tensor([1.0, 4.0, 2.0, 3.0]), 2)
    assert kept.isfinite().tolist() == [False, True, False, True]


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[torch.tensor([2, 0, 3, 1])]
    for p, size in ((0.4, 1), (0.5, 1), (0.6, 2), (0.76, 3), (0.95, 4), (1.0, 4)):
        kept = filter_top_p(logits, p).isfinite()
        assert int(kept.sum()) == size, p
        assert set(logits[kept].tolist()) == set(logits.sort(descending=True).values[:size].tolist())


def test_frequencies_follow_the_probabilities() -> None:
    logits, generator = torch.tensor([0.7, 0.2, 0.1]).log(), torch.Generator().manual_seed(0)
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=generator)] += 1
    assert all(abs(c / 4000 - p) < 0.03 for c, p in zip(counts, (0.7, 0.2, 0.1), strict=True))
    assert sample_token(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None) == 0


def test_stop_strings_are_held_back() -> None:
    assert cut_at_stop("abcSTOPdef", ["STOP", "x"]) == ("abc", True)
    assert cut_at_stop("abc", []) == ("abc", False)
    assert displayable_length("abcST", ["STOP"]) == 3
    assert displayable_length("abcSTA", ["STOP"]) == 6
    assert displayable_length("ab\ufffd", []) == 2
