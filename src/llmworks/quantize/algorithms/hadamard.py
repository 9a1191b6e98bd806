"""Hadamard matrices: orthogonal, with entries of equal magnitude, so rotating by them spreads outlier columns.

Pure tensor functions.

Orders are 2^k times an order of Paley's construction (1933): q + 1 for primes q of 3 modulo 4, 2 (q + 1) for those of 1
modulo 4; 576 is 16 x 36. Random signs as in QuaRot (Ashkboos et al. 2024, arXiv:2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmworks.core.errors import ModelError


def hadamard(order: int) -> Tensor:
    """Return a Hadamard matrix [order, order], fp64. ModelError for an order without a known construction."""
    powers, rest = 0, order
    while True:
        base = _paley(rest)
        if base is not None:
            break
        if rest % 2:
            raise ModelError(f"no Hadamard matrix of order {order} is known")
        rest, powers = rest // 2, powers + 1
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(powers):
        base = torch.kron(two, base)
    return base


def _paley(order: int) -> Tensor | None:
    """Return a matrix of an order that needs no doubling, or None."""
    if order in (1, 2):
        return torch.tensor([[1.0]] if order == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4:
        return None
    if _is_odd_prime(order - 1) and order % 4 == 0:
        q = order - 1
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
        return skew + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if _is_odd_prime(half - 1) and half % 4 == 2:
        even = torch.zeros(half, half, dtype=torch.float64)
        even[0, 1:], even[1:, 0], even[1:, 1:] = 1, 1, _jacobsthal(half - 1)
        one = torch.eye(half, dtype=torch.float64)
        return torch.kron(even, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) + torch.kron(
            one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        )
    return None


def _is_odd_prime(q: int) -> bool:
    return q > 2 and all(q % n for n in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Return the Jacobsthal matrix: 1 where j - i is a square modulo q, -1 where not, 0 on the diagonal."""
    squares = {n * n % q for n in range(1, q)}
    signs = torch.tensor([0.0] + [1.0 if n in squares else -1.0 for n in range(1, q)], dtype=torch.float64)
    at = torch.arange(q)
    return signs[(at[None, :] - at[:, None]) % q]


def random_hadamard(order: int, seed: int) -> Tensor:
    """Return an orthogonal matrix [order, order], fp64: a normalized Hadamard matrix, its rows with random signs."""
    signs = (
        torch.randint(0, 2, (order, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.int64).to(
            torch.float64
        )
        * 2
        - 1
    )
    made: Tensor = signs * hadamard(order) / order**0.5
    return made
