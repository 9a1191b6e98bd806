"""Rows of tokens as a model is given them: whether its ids are known, and which texts a row holds. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.core.errors import ModelError


def check_ids(ids: Tensor | None, vocabulary: int) -> None:
    """Whether all ids have a row in the embedding. Errors: ModelError."""
    if ids is None or not ids.numel() or ids.device.type == "meta":
        return
    least, most = (int(x) for x in torch.aminmax(ids))
    if most >= vocabulary:
        raise ModelError(
            f"token id {most} is beyond the vocabulary of {vocabulary:,}; the tokenizer is another model's"
        )
    if least < 0:
        raise ModelError(f"token id {least} is below zero; only labels may be")


def segments_of(positions: Tensor) -> Tensor | None:
    """The number of each token's text in its row [batch, length]: positions that begin anew are another text's.

    None when all rows are one text.
    """
    again = positions.diff(dim=-1) <= 0
    return F.pad(again.cumsum(-1), (1, 0)) if again.any() else None


def parts_of(segments: Tensor) -> tuple[tuple[int, int], ...]:
    """The texts of one row, segments [length] in rising order, as (first token, last + 1).

    Empty where a number comes back, so that they are no parts.
    """
    if bool((segments.diff() < 0).any()):
        return ()
    ends: list[int] = [*(segments.diff().nonzero().flatten() + 1).tolist(), len(segments)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def texts_in(valid: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(text of each token that counts, its place in that text, lengths of the texts).

    valid, segments: [batch, length]; a text ends where its segment does.

    Texts are numbered in the order of the rows; tokens too, as `x[valid]` has them.
    """
    marks = segments.masked_fill(~valid, -1)
    begins = valid & (F.pad(marks[:, :-1], (1, 0), value=-2) != marks)
    text = begins.flatten().cumsum(0)[valid.flatten()] - 1
    lengths = torch.bincount(text, minlength=int(begins.sum()))
    first = lengths.cumsum(0) - lengths
    return text, torch.arange(len(text), device=text.device) - first[text], lengths
