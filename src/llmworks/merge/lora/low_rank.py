"""Low-rank approximation of a matrix by its largest singular vectors. Pure tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(change: Tensor, rank: int, min_energy: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """Return (A [r, in], B [out, r], relative error) with B A the best approximation of a change [out, in] in the
    Frobenius norm (Eckart and Young 1936).

    The rank is the smallest that keeps a fraction `min_energy` of the squared norm, at most `rank`; each factor has the
    square root of the singular values. Computed in fp64 by the eigenvectors of the smaller Gram matrix.
    """
    wide = change.double()
    turned = wide.shape[0] > wide.shape[1]
    matrix = wide.T if turned else wide
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = float(values.sum())
    if total == 0:
        return torch.zeros(1, change.shape[1]), torch.zeros(change.shape[0], 1), 0.0
    sums = values.cumsum(0)
    enough = int((sums < min_energy * total * (1 - 1e-12)).sum()) + 1
    chosen = max(1, min(rank, enough, int((values > total * 1e-15).sum())))
    left = vectors[:, :chosen]
    right = left.T @ matrix
    root = right.norm(dim=1).sqrt()
    left, right = left * root, right / root[:, None]
    a, b = (left.T, right.T) if turned else (right, left)
    return a.float().contiguous(), b.float().contiguous(), max(0.0, 1 - float(sums[chosen - 1]) / total) ** 0.5
