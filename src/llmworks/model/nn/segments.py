"""Check token ids and find the packed documents of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmworks.core.errors import ModelError


def check_ids(ids: Tensor | None, vocabulary: int) -> None:
    """Check that all ids are within the vocabulary. Errors: ModelError."""
    if ids is None or not ids.numel() or ids.device.type == "meta":
        return
    least, most = (int(x) for x in torch.aminmax(ids))
    if most >= vocabulary:
        raise ModelError(
            f"token id {most} is out of range for a vocabulary of {vocabulary:,}; the tokenizer belongs to"
            " another model"
        )
    if least < 0:
        raise ModelError(f"token id {least} is negative; only labels may be")


def get_segment_ids(positions: Tensor) -> Tensor | None:
    """Return segment ids [batch, length] of packed documents: positions that restart begin a new document.

    None when each row is one document.
    """
    again = positions.diff(dim=-1) <= 0
    return F.pad(again.cumsum(-1), (1, 0)) if again.any() else None


def get_segment_bounds(segments: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the documents of one row as (first token, last + 1); segments: ids [length] in rising order.

    Empty when a segment id recurs after another one.
    """
    if bool((segments.diff() < 0).any()):
        return ()
    ends: list[int] = [*(segments.diff().nonzero().flatten() + 1).tolist(), len(segments)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def index_sequences(valid: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (document of each valid token, its index in the document, document lengths).

    valid, segments: [batch, length]; a document ends where its segment ends.

    Documents and tokens are in row order; tokens as `x[valid]` has them.
    """
    marks = segments.masked_fill(~valid, -1)
    begins = valid & (F.pad(marks[:, :-1], (1, 0), value=-2) != marks)
    sequence_ids = begins.flatten().cumsum(0)[valid.flatten()] - 1
    lengths = torch.bincount(sequence_ids, minlength=int(begins.sum()))
    first = lengths.cumsum(0) - lengths
    return sequence_ids, torch.arange(len(sequence_ids), device=sequence_ids.device) - first[sequence_ids], lengths
